"""An engine that remembers: a chain or a score asked for again is what it was, and cost what it cost.

Methods that draw whole chains and then choose draw the very same ones (a chain's seed depends on the request's seed and
its index only). So several of them, at several numbers of chains, are compared on one set of chains, and these are
written once. Times of what is remembered mean nothing.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from typing import Any, cast

from thinkserve.server.plan import Backend
from thinkserve.strategies.around import Around
from thinkserve.strategies.engine import Delta, Engine, Job, Path, Role, Score, Stream
from thinkserve.strategies.streams import Through, Told, joined


class Book:
    """What was written and how it was scored."""

    def __init__(self) -> None:
        self.chains: dict[Job, tuple[Delta, int]] = {}
        self.scores: dict[tuple[str, Path, Role], Score] = {}


class Remembering(Around):
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
        # In how many parts tokens come, and for whom, changes none of them.
        key = replace(job, interval=1, chain=0)
        if key in self._book.chains:
            yield Told(*self._book.chains[key])
            return
        async with self._inner.generate(job) as stream:
            noting = _Noting(stream)
            yield noting
        if noting.read.finish is not None:
            self._book.chains[key] = noting.read, noting.cached

    async def score(self, question: str, paths: Sequence[Path], role: Role = "reward") -> list[Score]:
        """Only those that are not in the book are scored."""
        scores = self._book.scores
        fresh = list(dict.fromkeys(path for path in paths if (question, path, role) not in scores))
        found = await self._inner.score(question, fresh, role) if fresh else []
        scores.update({(question, path, role): score for path, score in zip(fresh, found, strict=True)})
        return [scores[question, path, role] for path in paths]


class _Noting(Through):
    __slots__ = ("read",)

    def __init__(self, inner: Stream) -> None:
        super().__init__(inner)
        self.read = Delta()

    async def __anext__(self) -> Delta:
        delta = await super().__anext__()
        self.read = joined(self.read, delta)
        return delta


class RecordedBackend:
    """A backend whose engines share a book."""

    def __init__(self, backend: Backend) -> None:
        self._backend, self._book = backend, Book()

    def engine(self, request_id: str, salt: str | None = None) -> Engine:
        """An engine for one request."""
        return Remembering(self._backend.engine(request_id, salt), self._book)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)


def recorded(backend: Backend) -> Backend:
    """The backend, remembering."""
    return cast(Backend, RecordedBackend(backend))
