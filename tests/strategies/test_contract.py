"""What holds of every registered strategy, built in or a stranger's; a new one is found here by itself.

Strategies run on ScriptedEngine; whoever has parameters `k`, `m` or `n` is tried with several.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies.contract import EVERY, ROLES, Jobs, Meter, engines, options_of, run, tasks
from thinkserve.strategies import registry
from thinkserve.strategies.engine import (
    Delta,
    Event,
    Finish,
    Piece,
    Task,
    Tokens,
)
from thinkserve.strategies.errors import EngineDead, EngineFailed
from thinkserve.strategies.pieces import Transcript
from thinkserve.strategies.single import STOPPED_BY
from thinkserve.strategies.testing import Recorder, ScriptedEngine, example


@EVERY
@given(task=tasks(), recipe=engines(), draw=st.data())
def test_budgets_are_kept_and_every_token_is_counted(
    name: str, task: Task, recipe: Callable[[], ScriptedEngine], draw: st.DataObject
) -> None:
    """No job asks for or gets more than allowed, none lives on, and the sum over streams is what the engine wrote."""
    entry, engine = registry.get(name), recipe()
    meter, options = Meter(engine), options_of(entry, draw)

    answer, out = run(entry, task, meter, options)

    assert all(stream.generated <= stream.job.max_tokens <= task.max_tokens for stream in engine.history)
    assert len(answer.tokens) <= task.max_tokens
    if task.thinking_budget is not None and task.phase == "thinking":
        assert len(out.tokens_of("thinking")) <= task.thinking_budget + 1
    assert ([], 0) == (engine.live, meter.open)
    assert engine.generated == meter.counted


@EVERY
@given(task=tasks(), recipe=engines(), draw=st.data())
def test_pieces_are_the_answer(
    name: str, task: Task, recipe: Callable[[], ScriptedEngine], draw: st.DataObject
) -> None:
    """Concatenated they are its tokens, labelled by the tags, log-probabilities in parallel."""
    entry, engine = registry.get(name), recipe()

    answer, out = run(entry, task, engine, options_of(entry, draw))

    transcript = Transcript(engine.info(), task.phase)
    transcript.push(Delta(answer.tokens, finish="stop"))
    expected = transcript.take()
    assert answer.tokens == out.tokens
    for phase in ("thinking", "answer"):
        assert tuple(t for p in expected if p.phase == phase for t in p.tokens) == out.tokens_of(phase)
    assert all(len(piece.tokens) == len(piece.logprobs) for piece in out.pieces)
    assert all(len(piece.tokens) == len(piece.top) for piece in out.pieces if task.logprobs is not None)


@EVERY
@given(task=tasks(), recipe=engines(), draw=st.data())
def test_the_same_seed_gives_the_same_answer(
    name: str, task: Task, recipe: Callable[[], ScriptedEngine], draw: st.DataObject
) -> None:
    """Two runs on equal engines do not differ in anything."""
    entry, options = registry.get(name), options_of(registry.get(name), draw)

    first, second = (run(entry, task, recipe(), options) for _ in range(2))

    assert (first[0], first[1].pieces) == (second[0], second[1].pieces)


@EVERY
@given(task=tasks(), recipe=engines(seeded=True), draw=st.data(), interval=st.integers(2, 70))
def test_tokens_that_nobody_reads_along_may_come_together(
    name: str, task: Task, recipe: Callable[[], ScriptedEngine], draw: st.DataObject, interval: int
) -> None:
    """An engine that hands them on in larger parts changes no answer."""
    entry, options = registry.get(name), options_of(registry.get(name), draw)

    at_once, together = (run(entry, replace(task, interval=each), recipe(), options) for each in (1, interval))

    assert (at_once[0].tokens, at_once[0].finish) == (together[0].tokens, together[0].finish)
    assert at_once[1].tokens == together[1].tokens


@EVERY
@given(task=tasks(), recipe=engines(), draw=st.data())
def test_the_answer_is_what_the_model_wrote(
    name: str, task: Task, recipe: Callable[[], ScriptedEngine], draw: st.DataObject
) -> None:
    """Every part of it was written by a job that had the prompt and all that comes before; our own is only a tag."""
    entry, engine = registry.get(name), recipe()

    answer, _ = run(entry, task, engine, options_of(entry, draw))

    known, before = 0, -1
    while known > before:
        before = known
        known += answer.tokens[known : known + 1] == engine.info().think_close
        for stream in engine.history:
            start = len(stream.job.prompt) - len(task.prompt)
            if 0 <= start <= known and stream.job.prompt == task.prompt + answer.tokens[:start]:
                known = max(known, start + common(tuple(stream.tokens), answer.tokens[start:]))
    assert len(answer.tokens) == known


@EVERY
@given(task=tasks(), recipe=engines(), draw=st.data())
def test_jobs_that_go_on_say_what_was_written(
    name: str, task: Task, recipe: Callable[[], ScriptedEngine], draw: st.DataObject
) -> None:
    """What acts on generated tokens has to act on these, too, when another job reads them."""
    entry, engine = registry.get(name), Jobs(recipe())

    run(entry, task, engine, options_of(entry, draw))

    assert {task.prompt} >= {job.prompt[: len(job.prompt) - job.written] for job in engine.seen}


@EVERY
@given(task=tasks(), recipe=engines(), draw=st.data())
def test_jobs_of_one_chain_come_one_after_another(
    name: str, task: Task, recipe: Callable[[], ScriptedEngine], draw: st.DataObject
) -> None:
    """Usage tells chains by their number, so those at work side by side must have several."""
    entry, engine = registry.get(name), Jobs(recipe())

    run(entry, task, engine, options_of(entry, draw))

    assert [] == engine.doubled


def common(first: Tokens, second: Tokens) -> int:
    """How many tokens two sequences begin with together."""
    return next(
        (at for at, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


@EVERY
@given(task=tasks(), recipe=engines(), draw=st.data())
def test_events_tell_a_complete_story(
    name: str, task: Task, recipe: Callable[[], ScriptedEngine], draw: st.DataObject
) -> None:
    """A chain that was started has exactly one end; the answer's chain was started, or its node created."""
    entry = registry.get(name)

    answer, out = run(entry, task, recipe(), options_of(entry, draw))

    def chains(*types: str) -> list[int]:
        return sorted(event.chain for event in out.events if event.type in types and event.chain is not None)

    assert chains("chain.started") == chains("chain.finished", "chain.aborted", "error")
    created = [event.data["node"] for event in out.events if event.type == "node.created"]
    assert answer.winner in (created or chains("chain.started"))


@EVERY
@pytest.mark.parametrize("limit", ["ceiling", "deadline"])
@pytest.mark.parametrize("at", [1, 4, 12, 40])
def test_limits_of_the_request_end_it_in_good_order(name: str, limit: Finish, at: int) -> None:
    """There is an answer of what exists, the reason is told, and nothing is generated beyond it."""
    entry = registry.get(name)
    engine = ScriptedEngine(["t" * 90 + "</think>1", "t" * 95], roles=ROLES, **{limit: at})  # type: ignore[arg-type]

    answer, _ = run(entry, Task(engine.encode("q<think>"), 99), engine, example(entry))

    assert (limit, STOPPED_BY[limit]) == (answer.finish, answer.stopped_by)
    assert [] == engine.live
    assert engine.generated <= (at if limit == "ceiling" else at * example(entry).chains())


def cancel_after(name: str, count: int, where: str) -> tuple[bool, ScriptedEngine, Meter]:
    """Cancel the request at its `count`-th emit or delta; whether it came that far."""
    entry = registry.get(name)
    engine = ScriptedEngine(["t\n\nt</think>1", "tttttt</think>22", "tt</think>3"], roles=ROLES)
    left = count

    async def go() -> tuple[bool, Meter]:
        with anyio.CancelScope() as scope:

            def tick() -> None:
                nonlocal left
                left -= 1
                if left < 0:
                    scope.cancel()

            async def emit(item: Piece | Event) -> None:
                if where == "emit":
                    tick()
                await anyio.lowlevel.checkpoint()

            meter = Meter(engine, tick if where == "delta" else lambda: None)
            await entry.run(Task(engine.encode("q<think>"), 40), meter, emit, example(entry))
        return scope.cancelled_caught, meter

    cancelled, meter = anyio.run(go)
    return cancelled, engine, meter


@EVERY
@pytest.mark.parametrize("where", ["emit", "delta"])
def test_a_cancelled_request_leaves_nothing_alive(name: str, where: str) -> None:
    """Whichever emit or delta the cancellation meets, all blocks are left and every token is counted."""
    for count in range(1000):
        cancelled, engine, meter = cancel_after(name, count, where)

        assert ([], 0) == (engine.live, meter.open), count
        assert engine.generated == meter.counted
        if not cancelled:
            break

    assert count > 5


@EVERY
@given(after=st.integers(0, 20), data=st.data())
def test_a_dead_engine_ends_the_request(name: str, after: int, data: st.DataObject) -> None:
    """EngineDead comes out as itself, from whichever chain, and nothing lives on."""
    entry = registry.get(name)
    options = options_of(entry, data)
    chain = data.draw(st.integers(0, options.chains() - 1), "chain")
    engine = ScriptedEngine(["t" * 90], roles=ROLES, fail={chain: (after, EngineDead("gone"))})

    with pytest.raises(EngineDead, match="gone"):
        run(entry, Task(engine.encode("q<think>"), 60), engine, options)

    assert [] == engine.live


@EVERY
def test_when_all_chains_fail_the_request_fails(name: str) -> None:
    """With the engine's own error, not a group of them."""
    entry = registry.get(name)
    engine = ScriptedEngine(["t" * 90], roles=ROLES, fail={i: (i % 3, EngineFailed("lost")) for i in range(64)})

    with pytest.raises(EngineFailed, match="lost"):
        run(entry, Task(engine.encode("q<think>"), 60), engine, example(entry))

    assert [] == engine.live


@EVERY
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_a_broken_emit_ends_the_request(name: str, share: float) -> None:
    """The reader is gone, at first, later, or for the last item: its error comes out as itself and nothing lives on."""
    entry = registry.get(name)

    def fresh() -> ScriptedEngine:
        return ScriptedEngine(["t" * 90 + "</think>1"], roles=ROLES)

    whole, engine = Recorder(), fresh()
    task = Task(engine.encode("q<think>"), 99)
    anyio.run(entry.run, task, fresh(), whole, example(entry))
    left = round(share * (len(whole.pieces) + len(whole.events) - 1))

    async def emit(item: Piece | Event) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise anyio.BrokenResourceError

    with pytest.raises(anyio.BrokenResourceError):
        anyio.run(entry.run, task, engine, emit, example(entry))
    assert [] == engine.live


@EVERY
def test_a_strategy_explains_itself(name: str) -> None:
    """Summary, described parameters with bounds on chains, a schema that JSON can hold."""
    entry = registry.get(name)
    schema = entry.options.model_json_schema()

    assert entry.summary.endswith(".")
    assert example(entry).chains() >= 1
    assert all(field.get("description") for field in schema.get("properties", {}).values())
    assert entry.options.model_config.get("extra") == "forbid"
