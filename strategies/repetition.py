"""Loops: finding them as they are written, and the modifier `repetition-guard` that ends a thought in one.

    after every token, while no period is being followed: has a window of the last tokens occurred before?
        then the distance is the period; how far back it holds is found by comparing hashes of stretches
    while a period is followed: does the token equal the one a period before?
    the same block `repeats` times back to back is a loop

Of a job that goes on with a chain the end of what the chain holds is looked at first, so that a loop may be spread
over many jobs. Windows are of `block` tokens, of twice as many, and so on: a short one may occur twice within a
block, and the distance of these is no period; one as long as the block recurs at the period only. Hashes are
polynomial in the tokens, so the hash of any stretch is a difference of two prefixes. A token costs a look-up per
size; a new period a few comparisons more. The rule is TrimR's (arXiv:2505.17155, section 3.3), with its loop ended
instead of the request.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from pydantic import Field

from thinkserve.strategies.ending import Ending, EndingOptions, Thought
from thinkserve.strategies.engine import Emit, Engine, Job, Task
from thinkserve.strategies.modifiers import modifier
from thinkserve.strategies.scale import scaled
from thinkserve.strategies.splice import Modified, Watcher

MODULUS, BASE = (1 << 61) - 1, 1_000_003


class Repetition:
    """Finds the first block of `block` to `most` tokens that has come `repeats` times in a row."""

    def __init__(self, block: int = 16, most: int = 256, repeats: int = 4) -> None:
        self._block, self._most, self._repeats = block, most, repeats
        self._tokens: list[int] = []
        self._hashes, self._powers = [0], [1]
        # Window sizes, the longest first, and of each where a window with a hash was last seen to end.
        sizes = [block << doubled for doubled in range(max(1, (most // block).bit_length()))]
        self._windows: list[tuple[int, dict[int, int]]] = [(size, {}) for size in reversed(sizes)]
        self._period = self._run = 0

    @property
    def reach(self) -> int:
        """How many tokens the longest loop takes: what came before them says nothing."""
        return self._most * self._repeats

    def push(self, token: int) -> int | None:
        """Take the next token; the length of the block when it completes a loop."""
        tokens = self._tokens
        tokens.append(token)
        self._hashes.append((self._hashes[-1] * BASE + token + 1) % MODULUS)
        self._powers.append(self._powers[-1] * BASE % MODULUS)
        end = len(tokens)
        windows = [(self._hash(end - size, end), seen) for size, seen in self._windows if size <= end]
        if self._period and token == tokens[end - 1 - self._period]:
            self._run += 1
        else:
            self._period = self._run = 0
            if last := next((seen[window] for window, seen in windows if window in seen), None):
                self._begin(end, end - last)
        for window, seen in windows:
            seen[window] = end
        return self._period if self._period and self._run >= (self._repeats - 1) * self._period else None

    def _begin(self, end: int, distance: int) -> None:
        """Follow a period: the least multiple of the distance that is as long as a block."""
        period = -(-self._block // distance) * distance
        if period > min(self._most, end - self._block):
            return
        # The longest stretch that equals the one a period before: by bisection, as a shorter end of it does so too.
        low, high = 0, min(end - period, (self._repeats - 1) * period)
        while low < high:
            size = (low + high + 1) // 2
            if self._hash(end - size, end) == self._hash(end - size - period, end - period):
                low = size
            else:
                high = size - 1
        if low:
            self._period, self._run = period, low

    def _hash(self, start: int, end: int) -> int:
        return (self._hashes[end] - self._hashes[start] * self._powers[end - start]) % MODULUS


def detector(context: int, block: int | None, most: int | None, repeats: int) -> Repetition:
    """A detector for a model: blocks that are not given are 16 to 256 tokens, of a small context its share."""
    least = block or scaled(16, context, least=4)
    return Repetition(least, max(least, most or scaled(256, context)), repeats)


class GuardOptions(EndingOptions):
    """Parameters of the repetition guard."""

    repeats: int = Field(default=4, ge=2, le=64, description="How often in a row the same block is a loop.")
    min_block: int | None = Field(
        default=None, ge=1, le=4096, description="Shortest block in tokens; left out, 16, or less for a small context."
    )
    max_block: int | None = Field(
        default=None,
        ge=1,
        le=16_384,
        description="Longest block in tokens; left out, 256, or less for a small context.",
    )


@modifier(
    "repetition-guard",
    title="Repetition guard",
    options=GuardOptions,
    reference="arXiv:2505.17155",
    resumes=True,
)
class RepetitionGuard(Modified):
    """Ends the thinking of a chain that has begun to repeat itself."""

    def __init__(self, inner: Engine, task: Task, emit: Emit, options: GuardOptions) -> None:
        super().__init__(inner, task, emit)
        self._options = options

    @asynccontextmanager
    async def follow(self, job: Job) -> AsyncIterator[Watcher]:
        """Looks for a loop, and for nothing else."""
        yield _Guarded(self, job, self._options)


class _Guarded(Thought):
    def __init__(self, modified: Modified, job: Job, options: GuardOptions) -> None:
        super().__init__(modified, job, options.sentence)
        self._repetition = detector(self.info.context, options.min_block, options.max_block, options.repeats)
        for token in self.before[-self._repetition.reach :]:
            self._repetition.push(token)

    def take(self, token: int, text: str) -> bool:
        if self._repetition.push(token):
            self.end(Ending("repetition", at_once=True))
        return False
