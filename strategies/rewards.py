"""What a process reward model says of the steps of a solution, made into one number (STEP rewards -> path value).

A reward is the probability that a step is right, given those before it. Not a number, or outside of [0, 1], is the
model's failure, and counts as the worst: 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import fsum, prod
from typing import Literal

from pydantic import Field

from thinkserve.strategies.engine import Score
from thinkserve.strategies.errors import Lost
from thinkserve.strategies.registry import Options
from thinkserve.strategies.text import steps

# last: for models of the reward to go. min: a chain is as good as its weakest step. prod: all of its steps are right.
Aggregate = Literal["last", "min", "prod", "mean"]

UNREAD = "the reward model could not rate some steps (too long for it, or no number); they count as the worst"


class RewardOptions(Options):
    """Parameters of every strategy that reads rewards."""

    aggregate: Aggregate = Field(
        default="last", description="How the rewards of a solution's steps become one: the last, least, product, mean."
    )
    on_reward_error: Literal["continue", "fail"] = Field(
        default="continue",
        description="If the reward model fails: make the best of what is there, by vote, or end with its error.",
    )

    def lose(self, error: Lost) -> str:
        """The warning with which to go on without rewards; raises the error where that is not wanted."""
        if self.on_reward_error == "fail":
            raise error
        return f"the reward model failed: {error}"


def aggregated(rewards: Sequence[float], how: Aggregate) -> float:
    """One number for all steps, in [0, 1]; without steps 0."""
    if not rewards:
        return 0.0
    if how == "last":
        return rewards[-1]
    if how == "min":
        return min(rewards)
    return prod(rewards) if how == "prod" else mean(rewards)


def mean(values: Sequence[float]) -> float:
    """The mean; 0 without values."""
    return fsum(values) / len(values) if values else 0.0


def cleaned(rewards: Iterable[float]) -> tuple[float, ...]:
    """The rewards, failures as 0 (a comparison with NaN is false)."""
    return tuple(reward if _is_reward(reward) else 0.0 for reward in rewards)


def unread(scores: Iterable[Score]) -> bool:
    """Whether there are failures among the rewards."""
    return not all(_is_reward(reward) for score in scores for reward in score.rewards)


def _is_reward(reward: float) -> bool:
    return 0.0 <= reward <= 1.0


def solution_steps(text: str) -> tuple[str, ...]:
    """Cut after every blank line; what is only white space belongs to the step before it, at the start to the next."""
    kept: list[str] = []
    for part in steps(text):
        if kept and (not part.strip() or not kept[-1].strip()):
            kept[-1] += part
        else:
            kept.append(part)
    return tuple(kept)
