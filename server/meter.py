"""MeteredEngine: what a request cost, chain by chain and model by model, as the engines counted it.

Tokens that were sampled but never read are included: a stream's own count is taken after its block has been left. Jobs
that go on where an earlier one was left (its prompt and what it wrote, or its prompt and seed) and the segments of a
chain are one chain; a branch of a tree is one as well.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import islice, takewhile

from thinkserve.server.metrics import Metrics
from thinkserve.strategies.around import Around, Open
from thinkserve.strategies.engine import Delta, Engine, Finish, Job, Path, Role, Score, Stream, Tokens
from thinkserve.strategies.errors import EngineFailed
from thinkserve.strategies.streams import Through

# Of a chain that ended in one of these ways nothing was cut off from outside.
FINISHED: frozenset[Finish | None] = frozenset({"stop", "length", "repetition"})


# Among so many of the last chains a job that goes on somewhere before their end is looked for.
RECENT = 256


@dataclass(slots=True)
class Tally:
    """One chain: tokens generated, prompt tokens found in the cache when it began, and how it ended (None: aborted)."""

    role: Role
    seed: int | None
    prompt: Tokens
    written: list[int] = field(default_factory=list[int])
    generated: int = 0
    cached: int = 0
    finish: Finish | None = None
    live: bool = True
    failed: bool = False

    def repeated(self, job: Job) -> int:
        """How much of this chain `job` goes on from: tokens of its last job, and one more for the same seed; or 0."""
        known, seeded = len(self.prompt), self.seed is not None and self.seed == job.seed
        if self.live or len(job.prompt) <= known or not (seeded or job.prompt[known] in self.written[:1]):
            return 0
        rest = zip(self.written, islice(job.prompt, known, None), strict=False)
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], rest)) + seeded
        # Last, because prompts are long, and few chains get here.
        return same if job.prompt[:known] == self.prompt else 0

    def replaced(self, job: Job) -> bool:
        """Whether other words stand where this chain's last job began, and `job` goes on behind them."""
        known = len(self.prompt)
        return not self.live and 0 < known < len(job.prompt) and job.prompt[:known] == self.prompt

    def go_on(self, job: Job) -> None:
        """The chain is at work again."""
        self.prompt, self.live, self.finish, self.written = job.prompt, True, None, []

    def end(self) -> int:
        """A hash of its prompt and all that it wrote since: what goes on from here begins with that."""
        return hash((self.role, self.prompt + tuple(self.written)))


@dataclass(slots=True)
class Scored:
    """What a reward model did: passes over paths, tokens in them, and how many of those were in its cache."""

    passes: int = 0
    tokens: int = 0
    cached: int = 0


class MeteredEngine(Around):
    """Counts everything that is generated and scored through it. `chains` are the target's."""

    def __init__(self, inner: Engine, metrics: Metrics) -> None:
        super().__init__(inner)
        self._metrics = metrics
        self.chains: list[Tally] = []
        self.scored = Scored()
        self.jobs: Counter[Role] = Counter()
        self._helping: list[Tally] = []
        # Where each job that writes the completion began, in tokens, and what was read of it.
        self._written: list[tuple[int, list[int]]] = []
        self._submitted = 0
        self._found = 0
        # Who ended where, by hash; None once somebody has gone on from there: whoever does so next is a branch.
        self._ends: dict[int, Tally | None] = {}

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
        return self.chains[0].cached if self.chains else 0

    @property
    def hit_ratio(self) -> float | None:
        """The part of all jobs' prompt tokens that was found in a cache; None for a single job."""
        return self._found / self._submitted if self.jobs.total() > 1 and self._submitted else None

    def by_role(self) -> dict[Role, int]:
        """Generated tokens per role."""
        totals: dict[Role, int] = {}
        for chain in (*self.chains, *self._helping):
            totals[chain.role] = totals.get(chain.role, 0) + chain.generated
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
        chains = self.chains if job.role == "target" else self._helping
        earlier = self._earlier(job, chains)
        tally = earlier or Tally(job.role, job.seed, job.prompt)
        if earlier is None:
            chains.append(tally)
            # A tree has thousands, each with a long prompt.
            if len(chains) > RECENT:
                chains[-RECENT - 1].prompt = ()
        else:
            earlier.go_on(job)
        self.jobs[job.role] += 1
        if job.role in ("target", "guide"):
            self._written.append((len(job.prompt), tally.written))
        stream: Stream | None = None
        self._metrics.chains_inflight.inc()
        try:
            async with open(job) as stream:
                yield _Metered(stream, tally)
        except EngineFailed:
            tally.failed = True
            raise
        finally:
            self._metrics.chains_inflight.dec()
            # Only now, after the block, is the count final.
            tally.live = False
            if tally.written:
                self._ends[tally.end()] = tally
            if stream is not None:
                tally.generated += stream.generated
                self._submitted += len(job.prompt)
                self._found += stream.cached
                tally.cached = stream.cached if earlier is None else tally.cached

    def _earlier(self, job: Job, chains: list[Tally]) -> Tally | None:
        """The chain that a job goes on with: that which ended right there, or of the last ones the best fit."""
        end = hash((job.role, job.prompt))
        if end in self._ends:
            exact, self._ends[end] = self._ends[end], None
            return None if exact is None or exact.live else exact
        recent = chains[-RECENT:]
        repeated = [chain.repeated(job) for chain in recent]
        if most := max(repeated, default=0):
            return recent[repeated.index(most)]
        # A guide's words, say. Where several chains began at one place, nobody knows which of them they are of.
        replaced = [chain for chain in recent if chain.replaced(job)]
        last = max((len(chain.prompt) for chain in replaced), default=0)
        latest = [chain for chain in replaced if len(chain.prompt) == last]
        return latest[0] if len(latest) == 1 else None


class _Metered(Through):
    __slots__ = ("_tally",)

    def __init__(self, inner: Stream, tally: Tally) -> None:
        super().__init__(inner)
        self._tally = tally

    async def __anext__(self) -> Delta:
        delta = await self._inner.__anext__()
        self._tally.written += delta.tokens
        if delta.finish is not None:
            self._tally.finish = delta.finish
        return delta
