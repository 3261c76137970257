"""What a search may spend, what it has spent, and the parameters by which a caller limits it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pydantic import Field

from thinkserve.strategies.engine import Engine, Task
from thinkserve.strategies.registry import Options
from thinkserve.strategies.settle import FORCED_TOKENS, SHORT_ANSWER


class TreeOptions(Options):
    """Parameters of every tree search."""

    step_tokens: int = Field(default=256, ge=1, le=4096, description="Tokens of a step that no blank line ends.")
    max_depth: int = Field(
        default=40, ge=1, le=256, description="Steps of a solution; the last one is written to the end."
    )
    max_passes: int | None = Field(
        default=None, ge=1, le=100_000, description="Solutions that are scored; left out, the other limits decide."
    )


@dataclass(frozen=True, slots=True)
class Limits:
    """The bounds of one search; None: not bounded. Wall time is the engine's to end.

    `tokens` counts all that is generated; `reserve` of them are kept for finishing a solution when no proposal is
    complete. `step` and `depth` bound one solution, `path` is its length in tokens, `nodes` how many may wait.
    """

    tokens: int
    reserve: int
    path: int
    step: int
    depth: int
    passes: int | None = None
    expansions: int | None = None
    nodes: int | None = None

    def share(self, spent: Spent, searches: int) -> Limits:
        """What is left for each of several searches that go on side by side; the reserve stays here."""

        def part(limit: int | None, used: int) -> int | None:
            return None if limit is None else max(0, limit - used) // searches

        return replace(
            self,
            tokens=max(0, self.tokens - self.reserve - spent.tokens) // searches,
            reserve=0,
            passes=part(self.passes, spent.passes),
            expansions=part(self.expansions, spent.expansions),
        )


def limits(
    task: Task, engine: Engine, options: TreeOptions, *, expansions: int | None = None, nodes: int | None = None
) -> Limits:
    """The limits that follow from a request.

    All proposals together get what `chains()` full chains would: that is what admission has counted, and it bounds
    every search before its first token.
    """
    path = max(0, min(task.max_tokens, engine.info().context - len(task.prompt)))
    tokens = options.chains() * task.max_tokens
    if task.max_total_tokens is not None:
        tokens = min(tokens, task.max_total_tokens)
    # Enough to think on and answer. A single chain that uses up its tokens has nothing to go back to.
    reserve = min(path, tokens // 4) if options.chains() > 1 else 0
    return Limits(tokens, reserve, path, options.step_tokens, options.max_depth, options.max_passes, expansions, nodes)


def answer_room(left: int) -> int:
    """Tokens that an answer gets whose thinking has to be ended: a quarter, or what a short one takes."""
    return min(FORCED_TOKENS, max(left // 4, min(left, SHORT_ANSWER)))


@dataclass(slots=True)
class Spent:
    """What a search has cost: tokens generated, solutions scored, nodes expanded."""

    tokens: int = 0
    passes: int = 0
    expansions: int = 0

    def add(self, other: Spent) -> None:
        """Take in what a search beside this one has cost."""
        self.tokens += other.tokens
        self.passes += other.passes
        self.expansions += other.expansions

    def over(self, limits: Limits) -> str | None:
        """Which limit is reached, in the words of the answer's reason."""
        if self.tokens >= limits.tokens - limits.reserve:
            return "tokens"
        if limits.passes is not None and self.passes >= limits.passes:
            return "passes"
        if limits.expansions is not None and self.expansions >= limits.expansions:
            return "expansions"
        return None

    def __str__(self) -> str:
        return f"{self.expansions} expansions, {self.passes} scorer passes, {self.tokens} tokens"
