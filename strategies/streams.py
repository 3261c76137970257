"""Streams around streams."""

from __future__ import annotations

from collections.abc import AsyncIterator

from thinkserve.strategies.engine import Delta, Finish, Stream


class Through:
    """Base of the wrapped streams: hands everything on, and what it cost is the inner stream's to say."""

    __slots__ = ("_inner",)

    def __init__(self, inner: Stream) -> None:
        self._inner = inner

    @property
    def generated(self) -> int:
        """Tokens sampled so far."""
        return self._inner.generated

    @property
    def cached(self) -> int:
        """Prompt tokens found in the prefix cache."""
        return self._inner.cached

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Delta:
        return await self._inner.__anext__()

    def unread(self) -> Delta:
        """What has been written and not read, the end included."""
        return self._inner.unread()


class Recorded(Through):
    """A stream whose tokens are added to a list as they are read."""

    __slots__ = ("_tokens",)

    def __init__(self, inner: Stream, tokens: list[int]) -> None:
        super().__init__(inner)
        self._tokens = tokens

    async def __anext__(self) -> Delta:
        return self._record(await super().__anext__())

    def unread(self) -> Delta:
        """What has been written and not read; now it has."""
        return self._record(super().unread())

    def _record(self, delta: Delta) -> Delta:
        self._tokens.extend(delta.tokens)
        return delta


class Told:
    """A stream that says one delta, at once."""

    __slots__ = ("_delta", "cached", "generated")

    def __init__(self, delta: Delta, cached: int = 0) -> None:
        self._delta: Delta | None = delta
        self.generated, self.cached = len(delta.tokens), cached

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Delta:
        delta, self._delta = self._delta, None
        if delta is None:
            raise StopAsyncIteration
        return delta

    def unread(self) -> Delta:
        """What has not been said."""
        delta, self._delta = self._delta, None
        return delta or Delta()


class Ended(Told):
    """A stream of no tokens: all that it says is how it ended."""

    __slots__ = ()

    def __init__(self, finish: Finish) -> None:
        super().__init__(Delta(finish=finish))


def joined(first: Delta, then: Delta) -> Delta:
    """Two deltas of one stream as one."""
    top, stats, finish = first.top + then.top, first.stats + then.stats, then.finish or first.finish
    return Delta(first.tokens + then.tokens, first.logprobs + then.logprobs, top, finish, stats)


def parted(delta: Delta, at: int) -> tuple[Delta, Delta]:
    """The first `at` tokens of a delta, and the others, with whose last the stream ended if it did."""

    def part(first: int | None, last: int | None, finish: Finish | None) -> Delta:
        tokens, logprobs = delta.tokens[first:last], delta.logprobs[first:last]
        return Delta(tokens, logprobs, delta.top[first:last], finish, delta.stats[first:last])

    whole = at >= len(delta.tokens)
    return part(None, at, delta.finish if whole else None), part(at, None, None if whole else delta.finish)


async def growing(stream: Stream) -> AsyncIterator[Delta]:
    """All that a stream has said so far, again with every delta."""
    read = Delta()
    async for new in stream:
        read = joined(read, new)
        yield read


async def whole(stream: Stream) -> Delta:
    """All that a stream says, read to its end."""
    read = Delta()
    async for read in growing(stream):  # noqa: B007  # the last one is wanted
        pass
    return read
