"""Ceiling, deadline and stop strings end streams in time, with a finish of their own, and leave nothing live."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import anyio
import pytest
from anyio.lowlevel import checkpoint

from thinkserve.server.answer_stops import AnswerStops
from thinkserve.server.limits import LimitedEngine
from thinkserve.strategies import registry
from thinkserve.strategies.engine import Delta, Engine, Finish, Job, Path, Role, Score, Stream, Task, Tokens
from thinkserve.strategies.testing import Recorder, ScriptedEngine

pytestmark = pytest.mark.anyio
JOB = Job(prompt=(5,), max_tokens=100, seed=1)


def silent() -> ScriptedEngine:
    """An engine that does not say a word for an hour."""
    return ScriptedEngine(["a" * 50], tick=3600)


async def read(engine: Engine, job: Job = JOB) -> tuple[int, Finish | None]:
    count, finish = 0, None
    async with engine.generate(job) as stream:
        async for delta in stream:
            count += len(delta.tokens)
            finish = delta.finish
    return count, finish


async def test_the_deadline_wakes_a_reader_of_a_silent_engine() -> None:
    """The stream ends with "deadline", soon, and the engine's job is gone."""
    engine = silent()
    with anyio.fail_after(2), LimitedEngine(engine, None, 0.05) as limited:
        assert await read(limited) == (0, "deadline")
    assert engine.live == []
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


async def test_what_was_written_until_the_deadline_is_read() -> None:
    """Of a chain whose tokens come many at a time as of any other; the next job gets nothing."""
    engine = ScriptedEngine(["a" * 90], tick=0.02)
    with anyio.fail_after(2), LimitedEngine(engine, None, 0.3) as limited:
        count, finish = await read(limited, replace(JOB, interval=80))
        assert await read(limited) == (0, "deadline")
    assert (count, finish) == (engine.history[0].generated, "deadline")
    assert 2 < count < 80


async def test_all_chains_end_at_the_deadline_and_new_ones_never_start() -> None:
    """A job that comes too late ends before the engine hears of it."""
    engine, ends = silent(), []

    async def one() -> None:
        ends.append(await read(limited))

    with anyio.fail_after(2), LimitedEngine(engine, None, 0.05) as limited:
        async with anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(one)
        await one()
    assert ends == [(0, "deadline")] * 4
    assert len(engine.history) == 3


@pytest.mark.parametrize("cancel_first", [True, False])
async def test_a_cancellation_at_the_very_moment_of_the_deadline_is_not_swallowed(cancel_first: bool) -> None:
    """The reader's own scope comes first, in whichever order the two arrive."""
    engine = silent()
    limited = LimitedEngine(engine)
    reached = False

    async def reader() -> None:
        nonlocal reached
        with scope:
            await read(limited)
            await checkpoint()
            reached = True

    scope = anyio.CancelScope()
    async with anyio.create_task_group() as group:
        group.start_soon(reader)
        await anyio.sleep(0.02)
        acts: list[Callable[[], None]] = [scope.cancel, lambda: limited.end("deadline")]
        for act in acts if cancel_first else reversed(acts):
            act()
    assert scope.cancelled_caught
    assert not reached
    assert engine.live == []


async def test_one_chain_stops_exactly_at_the_ceiling() -> None:
    """Not a token more, whatever the engine's steps."""
    for burst in (1, 7):
        engine = ScriptedEngine(["a" * 50], burst=burst)
        assert await read(LimitedEngine(engine, 10)) == (10, "ceiling")
        assert engine.generated == 10


async def test_the_ceiling_is_for_all_chains_together_and_ends_silent_ones_too() -> None:
    """Two chains share ten tokens; a third that is slow does not wait for its next token."""
    engine, ends = ScriptedEngine(["a" * 50], pace={2: 10**6}), list[tuple[int, Finish | None]]()
    limited = LimitedEngine(engine, 10)

    async def one(seed: int) -> None:
        ends.append(await read(limited, Job(prompt=(5,), max_tokens=100, seed=seed)))

    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            for seed in range(3):
                group.start_soon(one, seed)
    assert {finish for _, finish in ends} == {"ceiling"}
    assert 10 <= engine.generated <= 12
    assert engine.live == []


async def test_a_stream_within_the_ceiling_keeps_its_own_end() -> None:
    """Its length is its own, not the ceiling's."""
    assert await read(LimitedEngine(ScriptedEngine(["a" * 50]), 200)) == (51, "stop")
    short = Job(prompt=(5,), max_tokens=4, seed=1)
    assert await read(LimitedEngine(ScriptedEngine(["a" * 50]), 200), short) == (4, "length")


async def test_segments_of_a_chain_are_limited_as_jobs_are() -> None:
    """The ceiling holds across segments."""
    engine = ScriptedEngine(["a" * 50])
    finishes: list[Finish | None] = []
    async with LimitedEngine(engine, 5).chain(JOB) as chain:
        for _ in range(3):
            async with chain.segment(4) as stream:
                finishes += [delta.finish async for delta in stream if delta.finish]
    assert finishes == ["length", "ceiling", "ceiling"]
    assert engine.generated == 5


async def test_there_is_no_score_after_the_end() -> None:
    """A number made up would be wrong, so the caller is told that time is over."""
    engine = ScriptedEngine(["a"], roles=("target", "reward"))
    limited = LimitedEngine(engine)
    assert await limited.score("why?", [Path(("a",))]) == [Score((0.0,), tokens=1)]
    limited.end("deadline")
    with pytest.raises(TimeoutError):
        await limited.score("why?", [Path(("a",))])


class Slow(ScriptedEngine):
    """Another server's model, which takes its time to begin a job, to render and to score."""

    @asynccontextmanager
    async def generate(self, job: Job) -> AsyncIterator[Stream]:
        await anyio.sleep(3600)
        async with super().generate(job) as stream:
            yield stream

    async def render(self, messages: Sequence[Mapping[str, str]], role: Role = "target") -> Tokens:
        await anyio.sleep(3600)
        return await super().render(messages, role)

    async def score(self, question: str, paths: Sequence[Path], role: Role = "reward") -> list[Score]:
        await anyio.sleep(3600)
        return await super().score(question, paths, role)


async def test_the_deadline_ends_the_wait_for_a_job_and_for_a_score() -> None:
    """A helper that hangs must not take the answer along that is there already."""
    engine = Slow(["a"], roles=("target", "reward"))
    with anyio.fail_after(2), LimitedEngine(engine, None, 0.05) as limited:
        assert await read(limited) == (0, "deadline")
    with anyio.fail_after(2), LimitedEngine(engine, None, 0.05) as limited, pytest.raises(TimeoutError, match="dead"):
        await limited.score("why?", [Path(("a",))])


async def test_the_deadline_ends_the_wait_for_a_prompt() -> None:
    """There is none then; a job on it ends as any other does."""
    engine, chat = Slow(["a"]), [{"role": "user", "content": "Yes?"}]
    with anyio.fail_after(2), LimitedEngine(engine, None, 0.05) as limited:
        assert [(), ()] == [await limited.render(chat), await limited.render(chat)]
        assert (0, "deadline") == await read(limited, Job((), 1))


class Hesitant(ScriptedEngine):
    """Its verifier, on another server, takes its time to render."""

    async def render(self, messages: Sequence[Mapping[str, str]], role: Role = "target") -> Tokens:
        await anyio.sleep(3600)
        return await super().render(messages, role)


async def test_a_search_at_its_deadline_keeps_solutions_that_are_still_to_be_judged() -> None:
    """A verifier that hangs costs its opinion and nothing else."""
    engine = Hesitant(["so 7"], roles=("target", "verifier"))
    entry = registry.get("rap")
    with anyio.fail_after(5), LimitedEngine(engine, None, 0.2) as limited:
        task = Task(prompt=(5,), max_tokens=100, seed=3, phase="answer")
        answer = await entry.run(task, limited, Recorder(), entry.options.model_validate({"samples": 2}))
    assert "so 7" == engine.decode(answer.tokens)
    assert ("stop", "deadline") == (answer.finish, answer.stopped_by)
    assert () == answer.warnings


@pytest.mark.parametrize("policy", ["continue", "fail"])
async def test_a_watched_chain_ends_at_its_deadline_though_the_verifier_hangs(policy: str) -> None:
    """As it would without being watched."""
    engine = Hesitant(["Wait, it is 7.\n\n" * 20_000], tick=0.001, roles=("target", "verifier"))
    entry = registry.get("trimr")
    with anyio.fail_after(5), LimitedEngine(engine, None, 0.3) as limited:
        task = Task(prompt=(5,), max_tokens=10**6, seed=3)
        options = {"underthinking": False, "repetition": False, "on_verifier_error": policy}
        answer = await entry.run(task, limited, Recorder(), entry.options.model_validate(options))
    assert "deadline" == answer.finish
    assert () == answer.warnings


async def test_the_ceiling_lets_scores_come_and_the_deadline_does_not() -> None:
    """They cost no tokens, and what was written before the ceiling is worth ranking."""
    engine = ScriptedEngine(["a"], roles=("target", "reward"))
    limited = LimitedEngine(engine, 10)
    async with anyio.create_task_group() as group:
        group.start_soon(limited.score, "why?", [Path(("a",))])
        await checkpoint()
        limited.end("ceiling")
    assert 1 == len(await limited.score("why?", [Path(("a",))]))
    assert len(engine.scored) == 2

    limited.end("deadline")
    with pytest.raises(TimeoutError):
        await limited.score("why?", [Path(("a",))])


@pytest.mark.parametrize("name", ["best-of-n", "weighted-vote"])
async def test_chains_that_used_up_their_ceiling_are_ranked_all_the_same(name: str) -> None:
    """By the reward model, not by their number."""
    script = ["t</think>\\boxed{1}", "t</think>\\boxed{1}", "t</think>\\boxed{2}" + "t" * 99]
    engine = ScriptedEngine(script, roles=("target", "reward"), rate=lambda steps: 0.9 if "2" in steps[-1] else 0.1)
    entry = registry.get(name)
    limited = LimitedEngine(engine, 60)
    answer = await entry.run(
        Task(engine.encode("q<think>"), 200, seed=3), limited, Recorder(), entry.options.model_validate({"k": 3})
    )
    assert "ceiling" == limited.ending()
    assert len(engine.scored) == 1
    assert () == answer.warnings


async def test_a_cancellation_while_a_job_begins_is_not_taken_for_the_deadline() -> None:
    """Whoever cancelled gets what they asked for."""
    limited = LimitedEngine(Slow(["a"]))
    with anyio.fail_after(2), anyio.move_on_after(0.02) as scope:
        await read(limited)
    assert scope.cancelled_caught


@pytest.mark.parametrize("name", ["majority", "short-m-at-k"])
async def test_a_race_at_its_deadline_decides_with_what_it_has(name: str) -> None:
    """Finished chains vote; the rest is given up."""
    engine = ScriptedEngine(["t</think>\\boxed{7}", "t" * 20_000], tick=0.001)
    entry = registry.get(name)
    with anyio.fail_after(10), LimitedEngine(engine, None, 1.0) as limited:
        task = Task(prompt=(5,), max_tokens=10**6, seed=3)
        answer = await entry.run(task, limited, Recorder(), entry.options.model_validate({"k": 2}))
    assert engine.decode(answer.tokens).endswith("\\boxed{7}")
    assert answer.stopped_by == "deadline"
    assert engine.live == []


@pytest.mark.parametrize("burst", [1, 3, 100])
async def test_a_stop_string_ends_the_answer_and_no_thought(burst: int) -> None:
    """The same string may be thought; the stream ends with the token that completes it, however tokens arrive."""
    engine = ScriptedEngine(["say END</think>it is 4 END of it"], burst=burst)
    stops = AnswerStops(engine, Task(prompt=JOB.prompt, max_tokens=100, stop=("END", "never")))
    async with stops.generate(JOB) as stream:
        tokens = [token async for delta in stream for token in delta.tokens]
    assert engine.decode(tokens) == "say ENDit is 4 END"
    assert engine.live == []


async def test_a_stop_string_may_begin_in_one_segment_and_end_in_the_next() -> None:
    """A chain's answer is one text."""
    engine = ScriptedEngine(["xSTOPy"])
    stops = AnswerStops(engine, Task(prompt=JOB.prompt, max_tokens=100, phase="answer", stop=("STOP",)))
    finishes: list[Finish | None] = []
    async with stops.chain(JOB) as chain:
        for _ in range(2):
            async with chain.segment(3) as stream:
                finishes += [delta.finish async for delta in stream]
        assert engine.decode(chain.tokens) == "xSTOP"
    assert finishes == [None, None, "length", None, "stop"]


async def test_a_chain_that_was_complete_before_the_deadline_has_not_been_cut() -> None:
    """However late it is read, its own end counts."""
    engine = ScriptedEngine(["abc"])
    with LimitedEngine(engine) as limited:
        async with limited.generate(JOB) as stream:
            await anext(stream)
            for _ in range(9):
                engine.step()
            limited.end("deadline")
            rest = [delta async for delta in stream]
    assert ("bc", "stop") == (engine.decode([t for delta in rest for t in delta.tokens]), rest[-1].finish)


async def test_a_chain_in_parts_has_what_was_written_until_the_deadline() -> None:
    """The unread tokens of a segment are tokens of the chain."""
    engine = ScriptedEngine(["a" * 90], tick=0.02)
    with anyio.fail_after(2), LimitedEngine(engine, None, 0.3) as limited:
        async with limited.chain(replace(JOB, interval=80)) as chain:
            async with chain.segment(100) as stream:
                read = [token async for delta in stream for token in delta.tokens]
            assert list(chain.tokens) == read
    assert engine.history[0].generated == len(read) > 2


@pytest.mark.parametrize("written", ["t</think>a STOP", "t</think>a STOP b"])
async def test_behind_a_stop_string_nothing_is_written(written: str) -> None:
    """Whoever wrote it, in an earlier job."""
    engine = ScriptedEngine(["never"])
    stops = AnswerStops(engine, Task(prompt=JOB.prompt, max_tokens=100, stop=("STOP",)))
    async with stops.generate(replace(JOB, prompt=JOB.prompt + engine.encode(written))) as stream:
        assert [Delta(finish="stop")] == [delta async for delta in stream]
    assert [] == engine.history


async def test_a_stop_string_ends_the_guides_answer_as_well() -> None:
    """It writes the same completion."""
    engine = ScriptedEngine(["t</think>a STOP b"], roles=("target", "guide"))
    stops = AnswerStops(engine, Task(prompt=JOB.prompt, max_tokens=100, stop=("STOP",)))
    async with stops.generate(replace(JOB, role="guide")) as stream:
        assert "ta STOP" == engine.decode([token async for delta in stream for token in delta.tokens])
