"""Streams that go on behind words of ours: the base of modifiers that end or turn a chain's thinking.

    read the chain token by token, hand on what comes
    when the watcher says so: leave the segment, which aborts it; drop what came behind the place; put our tokens there;
        go on in a new segment, which finds everything before in the prefix cache

Our tokens are part of the stream, with log-probability 0 and statistics that are not known; they are not counted as
generated. The watcher never sees them as the model's.

What was handed on is never taken back. Where a watcher may soon want to end the chain at a place that has just been
passed, it holds back what comes behind that place: decoding goes on, the reader waits.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Protocol

from thinkserve.strategies.around import Around, AroundChain
from thinkserve.strategies.engine import Chain, Control, Delta, Emit, Engine, Event, Job, Stream, Task, Tokens
from thinkserve.strategies.pieces import injected
from thinkserve.strategies.streams import joined, parted

Begin = Callable[[int], AbstractAsyncContextManager[Stream]]


@dataclass(frozen=True, slots=True)
class Splice:
    """Keep the first `keep` tokens of the delta at hand, then `tokens` of ours, and go on from there.

    A negative `keep` drops so many of those that were held back, too.
    """

    keep: int
    tokens: Tokens


class Watcher(Protocol):
    """Follows one chain and decides, synchronously: decoding is never held."""

    @property
    def held(self) -> int:
        """How many of the last tokens are not to be handed on yet."""
        ...

    def push(self, delta: Delta, room: int) -> Splice | None:
        """What the model wrote; `room` is how many tokens the segment may hold, these included. Raises EngineFailed.

        None where the delta is the stream's last: nothing can be put behind it.
        """
        ...

    def inject(self, tokens: Tokens) -> None:
        """What the strategy put into its chain itself."""
        ...

    def drop(self, left: Tokens) -> None:
        """What is left behind the job's prompt where the strategy, or a modifier above, has dropped the rest."""
        ...

    def news(self) -> Sequence[Event]:
        """What there is to tell since the last call."""
        ...


class Modified(Around):
    """Base of modifiers: every chain of the target model that may think has a watcher.

    `warnings` are for the answer of the request.
    """

    def __init__(self, inner: Engine, task: Task, emit: Emit) -> None:
        super().__init__(inner)
        self.task, self.emit = task, emit
        self.warnings: list[str] = []

    def follow(self, job: Job) -> AbstractAsyncContextManager[Watcher]:
        """A watcher for the chain that begins with `job`, for as long as the chain is open."""
        raise NotImplementedError

    def warn(self, text: str) -> None:
        """Note something for the answer, once."""
        if text not in self.warnings:
            self.warnings.append(text)

    @asynccontextmanager
    async def generate(self, job: Job) -> AsyncIterator[Stream]:
        """Run a job under watch."""
        if job.role != "target" or not self.info().reasons:
            async with self._inner.generate(job) as stream:
                yield stream
            return
        async with self.chain(job) as chain, chain.segment(job.max_tokens) as stream:
            yield stream

    @asynccontextmanager
    async def chain(self, job: Job) -> AsyncIterator[Chain]:
        """Open a chain under watch."""
        watched = job.role == "target" and self.info().reasons
        async with self._inner.chain(replace(job, interval=1) if watched else job) as chain:
            if not watched:
                yield chain
                return
            async with self.follow(job) as watcher:
                yield _Chain(chain, watcher, job, self.emit)


class _Chain(AroundChain):
    def __init__(self, inner: Chain, watcher: Watcher, job: Job, emit: Emit) -> None:
        super().__init__(inner)
        self.watcher, self.job, self.emit = watcher, job, emit

    def inject(self, tokens: Tokens) -> None:
        super().inject(tokens)
        self.watcher.inject(tokens)

    def drop(self, count: int) -> None:
        super().drop(count)
        self.watcher.drop(self.tokens)

    def splice(self, dropped: int, tokens: Tokens) -> None:
        """Put tokens of ours in the place of the last ones, unseen by the watcher."""
        super().drop(dropped)
        super().inject(tokens)

    @asynccontextmanager
    async def segment(
        self, max_tokens: int, until: Tokens = (), controls: tuple[Control, ...] | None = None
    ) -> AsyncIterator[Stream]:
        def begin(most: int) -> AbstractAsyncContextManager[Stream]:
            return self._inner.segment(most, until, controls)

        spliced: _Spliced | None = None
        try:
            async with AsyncExitStack() as stack:
                stream = await stack.enter_async_context(begin(max_tokens))
                spliced = _Spliced(self, stack, begin, stream, max_tokens)
                yield spliced
        finally:
            # What nobody has read is no part of the chain.
            if spliced is not None and spliced.held.tokens:
                self.drop(len(spliced.held.tokens))


class _Spliced:
    """One segment as the strategy sees it, out of as many as it takes; `held` is what was not handed on yet."""

    def __init__(self, chain: _Chain, stack: AsyncExitStack, begin: Begin, stream: Stream, room: int) -> None:
        self._chain, self._stack, self._begin = chain, stack, begin
        self._streams, self._room = [stream], room
        self.held = Delta()

    @property
    def generated(self) -> int:
        return sum(stream.generated for stream in self._streams)

    @property
    def cached(self) -> int:
        return self._streams[0].cached

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Delta:
        while True:
            delta = await self._streams[-1].__anext__()
            chain = self._chain
            splice = chain.watcher.push(delta, self._room)
            for event in chain.watcher.news():
                await chain.emit(event)
            read, self.held = joined(self.held, delta), Delta()
            if splice is not None:
                self._room -= splice.keep + len(splice.tokens)
                return await self._cut(read, splice.keep - len(delta.tokens), splice.tokens)
            self._room -= len(delta.tokens)
            back = 0 if delta.finish else chain.watcher.held
            read, self.held = parted(read, len(read.tokens) - back)
            if read.tokens or read.finish:
                return read

    async def _cut(self, read: Delta, end: int, tokens: Tokens) -> Delta:
        """What was read up to `end`, counted from behind, and `tokens` of ours, behind which the chain goes on."""
        chain = self._chain
        await self._stack.aclose()
        chain.splice(-end, tokens)
        self._streams.append(await self._stack.enter_async_context(self._begin(self._room)))
        kept, _ = parted(read, len(read.tokens) + end)
        return joined(kept, injected(tokens, chain.job.logprobs, stats=chain.job.stats))

    def unread(self) -> Delta:
        read, self.held = joined(self.held, self._streams[-1].unread()), Delta()
        return read
