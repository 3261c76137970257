"""Streams that go on behind words of ours: what is held back, dropped, handed on."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinkserve.strategies.engine import Chain, Delta, Event, Job, Task, Tokens
from thinkserve.strategies.splice import Modified, Splice
from thinkserve.strategies.streams import whole
from thinkserve.strategies.testing import Recorder, ScriptedEngine

pytestmark = pytest.mark.anyio

SCRIPT = "abcdefghijklmnopqrst"
# The number of tokens read so far, to how many of the last are held back, or to what is cut in.
Says = Callable[[int], int | Splice]


class Saying:
    """A watcher that does what it is told."""

    def __init__(self, says: Says) -> None:
        self._says, self._read = says, 0
        self.held = 0

    def push(self, delta: Delta, room: int) -> Splice | None:
        self._read += len(delta.tokens)
        said = self._says(self._read)
        self.held = 0 if isinstance(said, Splice) else said
        return said if isinstance(said, Splice) and delta.finish is None else None

    def inject(self, tokens: Tokens) -> None: ...

    def drop(self, left: Tokens) -> None:
        self.held = 0

    def news(self) -> Sequence[Event]:
        return ()


class Told(Modified):
    """A modifier with such a watcher."""

    says: Says

    @asynccontextmanager
    async def follow(self, job: Job) -> AsyncIterator[Saying]:
        yield Saying(self.says)


@asynccontextmanager
async def chain_of(engine: ScriptedEngine, says: Says) -> AsyncIterator[Chain]:
    """A chain under the eyes of such a watcher."""
    task = Task(engine.encode("q<think>"), 100, logprobs=0)
    told = Told(engine, task, Recorder())
    told.says = says
    async with told.chain(task.job()) as chain:
        yield chain


@given(held=st.lists(st.integers(0, 6), min_size=21, max_size=21), burst=st.integers(1, 4))
def test_what_is_held_back_comes_in_the_end(held: list[int], burst: int) -> None:
    """Whatever is held for however long: nothing is lost or doubled, and log-probabilities stay with their tokens."""

    async def read(says: Says) -> Delta:
        async with chain_of(ScriptedEngine([SCRIPT], burst=burst), says) as chain, chain.segment(100) as stream:
            got = await whole(stream)
        assert got.tokens == chain.tokens
        return got

    assert anyio.run(read, lambda at: 0) == anyio.run(read, lambda at: min(held[at - 1], at))


async def test_tokens_that_are_held_back_are_not_handed_on() -> None:
    """The reader is so many behind, and sees the rest at once when it is let go."""
    engine = ScriptedEngine([SCRIPT])
    async with chain_of(engine, lambda at: min(at, 3) if at < 10 else 0) as chain, chain.segment(100) as stream:
        sizes = [len(delta.tokens) async for delta in stream]

    assert [1] * 6 + [4] == sizes[:7]


async def test_a_cut_may_drop_what_was_held_back() -> None:
    """It was generated and paid for; our words stand in its place, and the chain goes on behind them."""
    engine = ScriptedEngine([SCRIPT])
    ours = engine.encode("[ours]")

    def says(at: int) -> int | Splice:
        return Splice(-2, ours) if at == 8 else min(at, 3) if at < 8 else 0

    async with chain_of(engine, says) as chain, chain.segment(100) as stream:
        got = await whole(stream)

    assert "abcde[ours]fghijklmnopqrst" == engine.decode(got.tokens)
    assert got.tokens == chain.tokens
    assert len(got.tokens) == len(got.logprobs)
    assert len(SCRIPT) + 1 + 3 == stream.generated == engine.generated


async def test_a_cut_gives_back_the_room_of_what_it_drops() -> None:
    """A segment holds as many tokens as it may, however they came."""
    engine = ScriptedEngine([SCRIPT])

    def says(at: int) -> int | Splice:
        return Splice(-2, engine.encode("+")) if at == 8 else min(at, 3) if at < 8 else 0

    async with chain_of(engine, says) as chain, chain.segment(12) as stream:
        got = await whole(stream)

    assert ("abcde+fghijk", "length") == (engine.decode(got.tokens), got.finish)


async def test_who_leaves_early_leaves_behind_what_was_held_back() -> None:
    """It is no prompt to the next segment."""
    engine = ScriptedEngine([SCRIPT])
    async with chain_of(engine, lambda at: min(at, 3)) as chain:
        async with chain.segment(100) as stream:
            read = await anext(stream)
        assert read.tokens == chain.tokens == engine.encode("a")
        async with chain.segment(100) as stream:
            await whole(stream)
        assert SCRIPT == engine.decode(chain.tokens)


async def test_what_was_held_back_counts_as_unread() -> None:
    """At a deadline it is still in the answer."""
    async with chain_of(ScriptedEngine([SCRIPT]), lambda at: min(at, 3)) as chain, chain.segment(100) as stream:
        read = (await anext(stream)).tokens + stream.unread().tokens
        assert len(read) > 3
        assert read == chain.tokens
