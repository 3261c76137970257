"""MeteredEngine: what a request cost, chain by chain and model by model, as the engines counted it.

Tokens that were sampled but never read are included: a stream's own count is taken after its block has been left.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import islice, takewhile

from thinkserve.server.metrics import Metrics
from thinkserve.strategies.around import Around, Open
from thinkserve.strategies.engine import Delta, Engine, Finish, Job, Path, Role, Score, Stream
from thinkserve.strategies.errors import EngineFailed
from thinkserve.strategies.streams import Through

# Of a chain that ended in one of these ways nothing was cut off from outside.
FINISHED: frozenset[Finish | None] = frozenset({"stop", "length", "repetition"})


@dataclass(slots=True)
class Tally:
    """One chain: tokens generated, prompt tokens found in the cache when it began, and how it ended (None: aborted).

    `live`: its jobs at work.
    """

    generated: int = 0
    cached: int = 0
    finish: Finish | None = None
    live: int = 0
    failed: bool = False


@dataclass(slots=True)
class Scored:
    """What a reward model did: passes over paths, tokens in them, and how many of those were in its cache."""

    passes: int = 0
    tokens: int = 0
    cached: int = 0


class MeteredEngine(Around):
    """Counts everything that is generated and scored through it."""

    def __init__(self, inner: Engine, metrics: Metrics) -> None:
        super().__init__(inner)
        self._metrics = metrics
        self.scored = Scored()
        self.jobs: Counter[Role] = Counter()
        self._tallies: dict[tuple[Role, int], Tally] = {}
        # Where each job that writes the completion began, in tokens, and what was read of it.
        self._written: list[tuple[int, list[int]]] = []
        self._submitted = 0
        self._found = 0

    @property
    def chains(self) -> list[Tally]:
        """The target's, first begun first."""
        return [tally for (role, _), tally in self._tallies.items() if role == "target"]

    @property
    def finished(self) -> int:
        """Chains that came to their own end."""
        return sum(not chain.live and chain.finish in FINISHED for chain in self.chains)

    @property
    def generated(self) -> int:
        """Tokens of all chains and roles; final once nothing is live."""
        return sum(self.by_role().values())

    @property
    def cached(self) -> int:
        """Prompt tokens that were in the cache before the request: what its first chain found."""
        return next((chain.cached for chain in self.chains), 0)

    @property
    def hit_ratio(self) -> float | None:
        """The part of all jobs' prompt tokens that was found in a cache; None for a single job."""
        return self._found / self._submitted if self.jobs.total() > 1 and self._submitted else None

    def by_role(self) -> dict[Role, int]:
        """Generated tokens per role."""
        totals: dict[Role, int] = {}
        for (role, _), chain in self._tallies.items():
            totals[role] = totals.get(role, 0) + chain.generated
        return totals

    def drawn(self, prompt: int, tokens: Sequence[int]) -> int:
        """How many of the tokens, which follow a prompt of that length, the models wrote where they stand."""
        found = bytearray(len(tokens))
        for start, written in self._written:
            at = start - prompt
            if 0 <= at < len(tokens):
                pairs = zip(written, islice(tokens, at, None), strict=False)
                same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
                found[at : at + same] = b"\1" * same
        return sum(found)

    async def score(self, question: str, paths: Sequence[Path], role: Role = "reward") -> list[Score]:
        """What the reward model says, counted."""
        scores = await super().score(question, paths, role)
        self.scored.passes += sum(score.tokens > 0 for score in scores)
        self.scored.tokens += sum(score.tokens for score in scores)
        self.scored.cached += sum(score.cached for score in scores)
        return scores

    @asynccontextmanager
    async def watch(self, open: Open, job: Job) -> AsyncIterator[Stream]:
        """Run a job and add its count to its chain."""
        key = job.role, job.chain
        first = key not in self._tallies
        tally = self._tallies.setdefault(key, Tally())
        tally.live, tally.finish = tally.live + 1, None
        self.jobs[job.role] += 1
        written = list[int]()
        if job.role in ("target", "guide"):
            self._written.append((len(job.prompt), written))
        stream: Stream | None = None
        self._metrics.chains_inflight.inc()
        try:
            async with open(job) as stream:
                yield _Metered(stream, tally, written)
        except EngineFailed:
            tally.failed = True
            raise
        finally:
            self._metrics.chains_inflight.dec()
            # Only now, after the block, is the count final.
            tally.live -= 1
            if stream is not None:
                tally.generated += stream.generated
                self._submitted += len(job.prompt)
                self._found += stream.cached
                tally.cached = stream.cached if first else tally.cached


class _Metered(Through):
    __slots__ = ("_tally", "_written")

    def __init__(self, inner: Stream, tally: Tally, written: list[int]) -> None:
        super().__init__(inner)
        self._tally = tally
        self._written = written

    async def __anext__(self) -> Delta:
        delta = await self._inner.__anext__()
        self._written += delta.tokens
        if delta.finish is not None:
            self._tally.finish = delta.finish
        return delta
