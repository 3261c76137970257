"""What the contract's tests are made of: tasks, engines and options to draw from, and engines that watch."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from math import nan
from typing import Any

import anyio
import pytest
from hypothesis import strategies as st

from thinkserve.strategies import registry
from thinkserve.strategies.around import Around, Open
from thinkserve.strategies.engine import (
    Answer,
    Delta,
    Job,
    Phase,
    Role,
    Sampling,
    Stream,
    Task,
    TokenStats,
)
from thinkserve.strategies.registry import Options, Strategy
from thinkserve.strategies.scripted import plain_stats
from thinkserve.strategies.streams import Through
from thinkserve.strategies.testing import Recorder, ScriptedEngine, Scripts, example

EVERY = pytest.mark.parametrize("name", registry.names())
ANSWERS = [r"It is \boxed{4}.", r"\boxed{04}", "so 5", "no idea", ""]


@st.composite
def scripts(draw: st.DrawFn) -> str:
    """Thinking that closes or goes on for ever, then some answer; now and then in steps."""
    thinking = draw(st.sampled_from(["t", "t", "t. ", "tt\n\n", "\n\nt"])) * draw(st.integers(0, 30))
    return draw(st.sampled_from([f"{thinking}</think>{answer}" for answer in ANSWERS] + [thinking, "t" * 500]))


@st.composite
def tasks(draw: st.DrawFn) -> Task:
    """Small limits, with and without thinking budget, alternatives and greedy sampling."""
    phase: Phase = draw(st.sampled_from(["thinking", "thinking", "answer"]))
    prompt = ScriptedEngine([""]).encode("q<think>" if phase == "thinking" else "q<think></think>")
    return Task(
        prompt,
        max_tokens=draw(st.integers(1, 60)),
        sampling=Sampling(temperature=draw(st.sampled_from([0.0, 1.0, 1.0]))),
        thinking_budget=draw(st.sampled_from([None, None, 0, 7])),
        phase=phase,
        seed=draw(st.integers(0, 9)),
        logprobs=draw(st.sampled_from([None, 2])),
    )


@st.composite
def engines(draw: st.DrawFn, *, seeded: bool = False) -> Callable[[], ScriptedEngine]:
    """A recipe for equal engines: scripts, pace, burst, overrun.

    Scripts go to jobs as they come, or, `seeded`, by their seeds, whoever comes first.
    """
    texts = draw(st.lists(scripts(), min_size=1, max_size=5))
    pace = draw(st.dictionaries(st.integers(0, 4), st.integers(1, 3), max_size=2))
    burst, overrun = draw(st.integers(1, 3)), draw(st.integers(0, 2))
    written: Scripts = (lambda job, _: texts[(job.seed or 0) % len(texts)]) if seeded else texts
    return lambda: ScriptedEngine(
        written, roles=ROLES, pace=pace, burst=burst, overrun=overrun, stats=unsettled, rate=undecided
    )


def unsettled(index: int, place: int) -> TokenStats:
    """Certainties and margins that go up and down; now and then closing is the best step."""
    return replace(plain_stats(index, place), close=1.0 if (3 * index + place) % 7 == 0 else -2.0)


def undecided(steps: tuple[str, ...]) -> float:
    """Rewards that go up and down along a path; now and then the model fails."""
    return (nan, 0.1, 0.9, 0.9, 0.4, 1.0)[len("".join(steps)) % 6]


ROLES: tuple[Role, ...] = ("target", "guide", "reward", "verifier")


def options_of(entry: Strategy, draw: st.DataObject) -> Options:
    """The defaults, or a few chains if the strategy runs several."""
    fields = entry.options.model_fields
    k = draw.draw(st.integers(1, 5), "k")
    m = draw.draw(st.integers(1, k), "m")
    given = {
        "k": k,
        "m": m,
        "n": m * draw.draw(st.integers(1, 3), "n / m"),
        "mode": draw.draw(st.sampled_from(["wall-clock", "length-exact"])),
        "lead_in": "",  # words of the strategy's own would not be the model's
        "underthinking": False,  # it closes thoughts with words of its own
    }
    modes = {"mode"} if "wall-clock" in str(fields.get("mode")) else set()
    ours = {"k", "m", "n", "lead_in", "underthinking", *modes}
    return example(entry, **{name: given[name] for name in ours & set(fields)})


class Meter(Around):
    """An engine around an engine that counts as a server does: each job's tokens, once its block has been left."""

    def __init__(self, inner: ScriptedEngine, on_delta: Callable[[], None] = lambda: None) -> None:
        super().__init__(inner)
        self.counted = 0
        self.open = 0
        self._on_delta = on_delta

    @asynccontextmanager
    async def watch(self, open: Open, job: Job) -> AsyncIterator[Stream]:
        """Counted, segments of chains too."""
        stream: Stream | None = None
        self.open += 1
        try:
            async with open(job) as stream:
                yield _Watched(stream, self._on_delta)
        finally:
            self.open -= 1
            self.counted += 0 if stream is None else stream.generated


class _Watched(Through):
    def __init__(self, inner: Stream, on_delta: Callable[[], None]) -> None:
        super().__init__(inner)
        self._on_delta = on_delta

    async def __anext__(self) -> Delta:
        delta = await super().__anext__()
        self._on_delta()
        return delta


def run(entry: Strategy, task: Task, engine: Any, options: Options) -> tuple[Answer, Recorder]:
    """A strategy from start to end."""
    out = Recorder()

    async def go() -> Answer:
        return await entry.run(task, engine, out, options)

    return anyio.run(go), out


class Jobs(Around):
    """An engine around an engine that notes the target's jobs, segments of chains left out.

    `doubled`: those that began while another job of their chain was at work.
    """

    def __init__(self, inner: ScriptedEngine) -> None:
        super().__init__(inner)
        self.seen: list[Job] = []
        self.doubled: list[Job] = []
        self._live: list[tuple[Role, int]] = []

    @asynccontextmanager
    async def watch(self, open: Open, job: Job) -> AsyncIterator[Stream]:
        """At work until its block is left."""
        key = job.role, job.chain
        self.doubled += [job] if job.role == "target" and key in self._live else []
        self._live.append(key)
        try:
            async with open(job) as stream:
                yield stream
        finally:
            self._live.remove(key)

    def generate(self, job: Job) -> AbstractAsyncContextManager[Stream]:
        """Noted and handed on."""
        self.seen += [job] if job.role == "target" else []
        return super().generate(job)
