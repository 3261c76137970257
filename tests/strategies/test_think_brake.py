"""think-brake: thinking stops at the end of a sentence where closing is almost the best step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import nan

import pytest

from thinkserve.strategies.engine import Task, TokenStats
from thinkserve.strategies.errors import Unsupported
from thinkserve.strategies.scripted import ScriptedStats
from thinkserve.strategies.sentences import Sentences
from thinkserve.strategies.testing import SCRIPTED, ScriptedEngine, play

pytestmark = pytest.mark.anyio

SCRIPT = "one. two\nthree? 3.14 four. five</think>so 7"


def close_at(odds: Mapping[int, float], otherwise: float = -9.0) -> ScriptedStats:
    """The log-odds of closing by place in the script."""
    return lambda _, at: TokenStats(1.0, 1.0, 1.0, odds.get(at, otherwise))


def task_for(engine: ScriptedEngine, max_tokens: int = 200, text: str = "q<think>") -> Task:
    """Any question."""
    return Task(engine.encode(text), max_tokens)


def thought(engine: ScriptedEngine, tokens: tuple[int, ...]) -> str:
    """The text of the thinking."""
    return engine.decode(tokens[: tokens.index(2)])


@pytest.mark.parametrize(
    ("at", "left"),
    [
        (4, "one."),  # the space that makes the full stop an end
        (5, "one. "),
        (9, "one. two\n"),
        (15, "one. two\nthree?"),
        (2, None),  # within a word
        (8, None),  # the line break itself
        (18, None),  # the point in a number
    ],
)
async def test_thinking_stops_at_ends_of_sentences_and_lines_only(at: int, left: str | None) -> None:
    """Where closing is near and a sentence or line has just ended; then the answer follows."""
    engine = ScriptedEngine([SCRIPT], stats=close_at({at: -0.05}))

    answer, out = await play("think-brake", engine, task_for(engine))

    assert (left or SCRIPT.split("</think>", maxsplit=1)[0]) == thought(engine, answer.tokens)
    assert engine.decode(answer.tokens).endswith("so 7")
    assert answer.tokens == out.tokens
    assert 1 == answer.tokens.count(2)


@pytest.mark.parametrize(("odds", "stops"), [(-0.1, True), (-0.11, False), (3.0, True), (nan, False)])
async def test_tau_is_the_largest_margin_that_brakes(odds: float, stops: bool) -> None:
    """The default is 0.1; what is not known never brakes."""
    engine = ScriptedEngine([SCRIPT], stats=close_at({5: odds}))

    answer, _ = await play("think-brake", engine, task_for(engine))

    assert stops == (thought(engine, answer.tokens) == "one. ")
    assert stops == ("margin" in answer.reason)


async def test_no_brake_is_single() -> None:
    """Token for token, in one job."""
    engine, other = ScriptedEngine([SCRIPT]), ScriptedEngine([SCRIPT])

    braked, out = await play("think-brake", engine, task_for(engine))
    plain, expected = await play("single", other, task_for(other))

    assert (plain.tokens, plain.finish) == (braked.tokens, braked.finish)
    assert expected.pieces == out.pieces
    assert 1 == len(engine.history)


@pytest.mark.parametrize(
    ("least", "left"), [(0, "one. "), (5, "one. "), (6, "one. two\n"), (40, "one. two\nthree? 3.14 four. five")]
)
async def test_min_think_holds_the_brake_back(least: int, left: str) -> None:
    """The first end after so many tokens."""
    engine = ScriptedEngine([SCRIPT], stats=close_at({5: 1.0, 9: 1.0}))

    answer, _ = await play("think-brake", engine, task_for(engine), min_think=least)

    assert left == thought(engine, answer.tokens)


@pytest.mark.parametrize("burst", [1, 2, 5, 40])
async def test_tokens_beyond_the_brake_are_dropped_however_they_come(burst: int) -> None:
    """Several tokens a step change nothing but what is generated in vain."""
    engine = ScriptedEngine([SCRIPT], stats=close_at({9: 0.0}), burst=burst)

    answer, out = await play("think-brake", engine, task_for(engine))

    assert "one. two\n" == thought(engine, answer.tokens)
    assert engine.decode(out.tokens_of("answer")) == "so 7"
    assert all(len(piece.tokens) == len(piece.logprobs) for piece in out.pieces)


@pytest.mark.parametrize("limit", [10, 11, 12, 30])
async def test_the_limit_holds_for_thinking_and_answer_together(limit: int) -> None:
    """With room for the tag alone there is no brake: an answer must fit."""
    engine = ScriptedEngine([SCRIPT], stats=close_at({9: 0.0}))

    answer, _ = await play("think-brake", engine, task_for(engine, limit))

    assert len(answer.tokens) <= limit
    assert (limit > 10) == (2 in answer.tokens)


async def test_the_second_job_asks_for_no_statistics_and_no_budget() -> None:
    """It writes the answer after our tag, with random numbers of its own."""
    engine = ScriptedEngine([SCRIPT], stats=close_at({5: 0.0}))

    await play("think-brake", engine, replace(task_for(engine), thinking_budget=30))
    first, second = engine.history

    assert (True, True, 30) == (first.job.stats, first.aborted, first.job.thinking_budget)
    assert (False, None) == (second.job.stats, second.job.thinking_budget)
    assert engine.encode("q<think>one. </think>") == second.job.prompt
    assert first.job.seed != second.job.seed


async def test_the_answer_is_never_braked() -> None:
    """Nor does a task that starts in the answer ask for statistics."""
    engine = ScriptedEngine(["Yes. No. 7"], stats=close_at({}, otherwise=5.0))

    answer, _ = await play("think-brake", engine, replace(task_for(engine, text="q<think></think>"), phase="answer"))

    assert "Yes. No. 7" == engine.decode(answer.tokens)
    assert [False] == [stream.job.stats for stream in engine.history]


@pytest.mark.parametrize("script", ["<think>one. two</think>7", "plain. text"])
async def test_a_model_that_opens_thinking_itself_is_braked_inside_only(script: str) -> None:
    """Text outside a think block is answer."""
    engine = ScriptedEngine([script], stats=close_at({}, otherwise=5.0))

    answer, _ = await play("think-brake", engine, replace(task_for(engine, text="q"), phase=None))

    assert ("<think>one.</think>7" if "<think>" in script else script) == "".join(
        {1: "<think>", 2: "</think>"}.get(token) or engine.decode([token]) for token in answer.tokens
    )


async def test_a_tag_of_several_tokens_is_refused() -> None:
    """Its margin is no number of one step."""
    engine = ScriptedEngine([SCRIPT], info=replace(SCRIPTED, think_close=(2, 1)))

    with pytest.raises(Unsupported, match="single token"):
        await play("think-brake", engine, task_for(engine))


async def test_a_model_without_tags_just_writes() -> None:
    """There is nothing to stop."""
    engine = ScriptedEngine(["One. Two."], info=replace(SCRIPTED, think_open=(), think_close=()))

    answer, _ = await play("think-brake", engine, task_for(engine, text="q"))

    assert "One. Two." == engine.decode(answer.tokens)


@pytest.mark.parametrize(
    ("parts", "ends"),
    [
        (["a", ".", " B"], [False, False, True]),
        (["a", ". ", "B"], [False, False, True]),
        (["a.", "\n", "\n", "b"], [False, True, True, True]),
        (["3", ".", "14"], [False, False, False]),
        (["Why?!", " So"], [False, True]),
    ],
)
async def test_sentences_end_before_white_space_however_tokens_are_cut(parts: list[str], ends: list[bool]) -> None:
    """A token is several bytes here."""
    engine = ScriptedEngine([""])
    sentences = Sentences(engine)

    assert ends == [sentences.ended(engine.encode(part)) for part in parts]
