"""An engine that remembers: a chain or a score asked for again is what it was, and cost what it cost.

Methods that draw whole chains and then choose draw the very same ones (a chain's seed depends on the request's seed and
its index only). So several of them, at several numbers of chains, are compared on one set of chains, and these are
written once. Times of what is remembered mean nothing.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, cast

from anyio.lowlevel import checkpoint

from thinkserve.server.plan import Backend
from thinkserve.strategies.around import Around
from thinkserve.strategies.engine import Delta, Engine, Job, Path, Role, Score, Stream


class Book:
    """What was written and how it was scored."""

    def __init__(self) -> None:
        self.chains: dict[Job, tuple[Delta, int]] = {}
        self.scores: dict[tuple[str, Path, Role], Score] = {}


class Recorded(Around):
    """Remembers whole seeded chains, and the scores of whole paths."""

    def __init__(self, inner: Engine, book: Book) -> None:
        super().__init__(inner)
        self._book = book

    def generate(self, job: Job) -> AbstractAsyncContextManager[Stream]:
        """From the book, or into it."""
        whole = job.seed is not None and job.written == 0 and not (job.stop_tokens or job.stats or job.controls)
        return self._noted(job) if whole else self._inner.generate(job)

    @asynccontextmanager
    async def _noted(self, job: Job) -> AsyncIterator[Stream]:
        if job in self._book.chains:
            yield _Known(*self._book.chains[job])
            return
        async with self._inner.generate(job) as stream:
            noting = _Noting(stream)
            yield noting
        if noting.last is not None:
            self._book.chains[job] = noting.whole(), stream.cached

    async def score(self, question: str, paths: Sequence[Path], role: Role = "reward") -> list[Score]:
        """Only those that are not in the book are scored."""
        scores = self._book.scores
        fresh = list(dict.fromkeys(path for path in paths if (question, path, role) not in scores))
        found = await self._inner.score(question, fresh, role) if fresh else []
        scores.update({(question, path, role): score for path, score in zip(fresh, found, strict=True)})
        return [scores[question, path, role] for path in paths]


class _Noting:
    def __init__(self, inner: Stream) -> None:
        self._inner = inner
        self._tokens: list[int] = []
        self._logprobs: list[float] = []
        self.last: Delta | None = None

    @property
    def generated(self) -> int:
        return self._inner.generated

    @property
    def cached(self) -> int:
        return self._inner.cached

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Delta:
        delta = await self._inner.__anext__()
        self._tokens += delta.tokens
        self._logprobs += delta.logprobs
        self.last = delta if delta.finish else None
        return delta

    def whole(self) -> Delta:
        """All of it in one."""
        finish = None if self.last is None else self.last.finish
        return Delta(tuple(self._tokens), tuple(self._logprobs), finish=finish)


class _Known:
    def __init__(self, delta: Delta, cached: int) -> None:
        self._left: Delta | None = delta
        self.generated, self.cached = len(delta.tokens), cached

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Delta:
        await checkpoint()
        delta, self._left = self._left, None
        if delta is None:
            raise StopAsyncIteration
        return delta


class RecordedBackend:
    """A backend whose engines share a book."""

    def __init__(self, backend: Backend) -> None:
        self._backend, self._book = backend, Book()

    def engine(self, request_id: str, salt: str | None = None) -> Engine:
        """An engine for one request."""
        return Recorded(self._backend.engine(request_id, salt), self._book)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)


def recorded(backend: Backend) -> Backend:
    """The backend, remembering."""
    return cast(Backend, RecordedBackend(backend))
