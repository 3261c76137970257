"""single: the chain as the engine writes it."""

from __future__ import annotations

import pytest

from thinkserve.strategies.engine import Event, Phase, Piece, Task
from thinkserve.strategies.single import SingleOptions, run
from thinkserve.strategies.testing import ScriptedEngine, play

pytestmark = pytest.mark.anyio


async def test_every_delta_goes_out_at_once() -> None:
    """One piece per delta, labelled, with its log-probability."""
    engine = ScriptedEngine(["ab</think>c"])

    answer, out = await play("single", engine, Task(engine.encode("q<think>"), 99))

    assert engine.encode("ab</think>c<eos>") == answer.tokens
    assert [("thinking", 1)] * 3 + [("answer", 1)] * 2 == [(piece.phase, len(piece.logprobs)) for piece in out.pieces]


@pytest.mark.parametrize(
    ("phase", "script", "thinking", "answer"),
    [
        ("thinking", "hm</think>yes", "hm</think>", "yes<eos>"),
        ("answer", "yes", "", "yes<eos>"),
        (None, "<think>hm</think>yes", "<think>hm</think>", "yes<eos>"),
        (None, "yes", "", "yes<eos>"),
        ("thinking", "hm", "hm<eos>", ""),
    ],
)
async def test_phases_follow_the_tags(phase: Phase | None, script: str, thinking: str, answer: str) -> None:
    """Where the task starts, and where the model closes."""
    engine = ScriptedEngine([script])

    _, out = await play("single", engine, Task(engine.encode("q"), 99, phase=phase))

    assert (engine.encode(thinking), engine.encode(answer)) == (out.tokens_of("thinking"), out.tokens_of("answer"))


@pytest.mark.parametrize(
    ("max_tokens", "ceiling", "finish", "stopped_by"),
    [(99, None, "stop", "all_done"), (3, None, "length", "length"), (99, 3, "ceiling", "budget")],
)
async def test_the_answer_tells_how_it_ended(
    max_tokens: int, ceiling: int | None, finish: str, stopped_by: str
) -> None:
    """The engine's reason, and ours."""
    engine = ScriptedEngine(["abcdef"], ceiling=ceiling)

    answer, _ = await play("single", engine, Task(engine.encode("q"), max_tokens))

    assert (finish, stopped_by) == (answer.finish, answer.stopped_by)


async def test_alternatives_come_through() -> None:
    """`top` runs parallel to the tokens when the task asks for it."""
    engine = ScriptedEngine(["ab"])

    _, out = await play("single", engine, Task(engine.encode("q"), 99, logprobs=2, phase="answer"))

    assert [1, 1, 1] == [len(piece.top) for piece in out.pieces]


async def test_a_token_costs_one_emit() -> None:
    """Beside the pieces only the start and the end are told."""
    engine = ScriptedEngine(["a" * 50])
    items: list[Piece | Event] = []

    async def emit(item: Piece | Event) -> None:
        items.append(item)

    await run(Task(engine.encode("q"), 99), engine, emit, SingleOptions())

    assert 51 + 2 == len(items)
