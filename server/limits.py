"""LimitedEngine: a request's ceiling of tokens over all chains, and its deadline; both end every stream at once.

A stream that ends this way has a finish of its own ("ceiling", "deadline"), so the strategy decides with what it has.
A reader that waits is woken, even if the engine says nothing; at the deadline so is whoever waits for a job to begin
(another server may take its time), for a prompt or for a score. Jobs begun afterwards end before they reach the engine.
The tokens of one engine step may pass the ceiling where several chains share it.
"""

from __future__ import annotations

import asyncio
from asyncio import CancelledError, Task
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Any, Literal, Self

from anyio import CancelScope

from thinkserve.strategies.around import Around, Open
from thinkserve.strategies.engine import Delta, Engine, Finish, Job, Path, Role, Score, Stream, Tokens
from thinkserve.strategies.streams import Ended, Through

End = Literal["ceiling", "deadline"]


class LimitedEngine(Around):
    """Ends all streams after `max_total_tokens`, or `seconds` after its block was entered."""

    def __init__(self, inner: Engine, max_total_tokens: int | None = None, seconds: float | None = None) -> None:
        super().__init__(inner)
        self._left = max_total_tokens
        self._seconds = seconds
        self._timer: asyncio.TimerHandle | None = None
        self._open: set[_Limited] = set()
        self._waits: set[CancelScope] = set()
        self._ended: End | None = None
        self._late = False

    def __enter__(self) -> Self:
        if self._seconds is not None:
            self._timer = asyncio.get_running_loop().call_later(self._seconds, self.end, "deadline")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def end(self, finish: End) -> None:
        """End all streams with this finish; the first call counts. After the deadline nothing else is waited for."""
        if self._ended is None:
            self._ended = finish
            for stream in self._open:
                stream.wake()
        if finish == "deadline":
            self._late = True
            for wait in self._waits:
                wait.cancel()

    def ending(self) -> End | None:
        """Why all streams end, once they do."""
        return self._ended

    def spend(self, count: int) -> None:
        """Take note of `count` tokens that were read."""
        if self._left is not None:
            self._left -= count
            if self._left <= 0:
                self.end("ceiling")

    @asynccontextmanager
    async def watch(self, open: Open, job: Job) -> AsyncIterator[Stream]:
        """Run a job within what is left."""
        if self._ended is not None:
            yield Ended(self._ended)
            return
        cut = self._left is not None and self._left < job.max_tokens
        async with AsyncExitStack() as stack:
            with self._waiting() as late:
                begun = open(replace(job, max_tokens=self._left) if cut and self._left else job)
                stream = await stack.enter_async_context(begun)
            if late.cancelled_caught:
                yield Ended("deadline")
                return
            limited = _Limited(stream, self, cut)
            self._open.add(limited)
            try:
                yield limited
            finally:
                self._open.discard(limited)

    async def render(self, messages: Sequence[Mapping[str, str]], role: Role = "target") -> Tokens:
        """A chat as the role's model wants it; () once the request has ended, as a job on it ends unheard anyway."""
        if self._ended is None:
            with self._waiting():
                return await super().render(messages, role)
        return ()

    async def score(self, question: str, paths: Sequence[Path], role: Role = "reward") -> list[Score]:
        """What the reward model says, which costs no tokens. Raises TimeoutError after the deadline."""
        if not self._late:
            with self._waiting():
                return await super().score(question, paths, role)
        raise TimeoutError("deadline")

    @contextmanager
    def _waiting(self) -> Iterator[CancelScope]:
        """A scope that is cancelled at the deadline."""
        with CancelScope() as scope:
            self._waits.add(scope)
            try:
                yield scope
            finally:
                self._waits.discard(scope)


class _Limited(Through):
    __slots__ = ("_cut", "_limits", "_over", "_reader", "_woken")

    def __init__(self, inner: Stream, limits: LimitedEngine, cut: bool) -> None:
        super().__init__(inner)
        self._limits = limits
        self._cut = cut
        self._over = False
        self._reader: Task[Any] | None = None
        self._woken = False

    def wake(self) -> None:
        """Get the reader out of its wait; as `asyncio.timeout` does it, without the cost of a scope per delta."""
        if self._reader is not None and not self._woken:
            self._woken = True
            self._reader.cancel()

    async def __anext__(self) -> Delta:
        if self._over:
            raise StopAsyncIteration
        limits = self._limits
        if (ended := limits.ending()) is not None:
            return self._cut_off(ended)
        self._reader = reader = asyncio.current_task()
        before = reader.cancelling() if reader else 0
        try:
            delta = await self._inner.__anext__()
        except CancelledError:
            ended = limits.ending()
            # Someone else may have cancelled the reader as well; that is not ours to swallow.
            if reader is None or ended is None or not self._woken or reader.uncancel() > before:
                raise
            return self._cut_off(ended)
        finally:
            self._reader = None
        limits.spend(len(delta.tokens))
        if delta.finish is None:
            ended = limits.ending()
            return delta if ended is None else self._last(delta, ended)
        self._over = True
        return replace(delta, finish="ceiling") if self._cut and delta.finish == "length" else delta

    def _cut_off(self, ended: End) -> Delta:
        """What had been written at the deadline, its own end included; behind the ceiling nothing is wanted."""
        unread = self._inner.unread() if ended == "deadline" else Delta()
        return self._last(unread, unread.finish or ended)

    def _last(self, delta: Delta, finish: Finish) -> Delta:
        self._over = True
        return replace(delta, finish=finish)
