"""Self-certainty: of k chains the surest answers, or votes by how sure it is (arXiv:2502.18581).

    run k chains with seeds of their own to their ends
    certainty of a chain = mean over its tokens of KL(uniform || p) = mean of  logsumexp(z) - mean(z) - ln V
                           or the lowest mean of `window` tokens in a row: a chain is as sure as its weakest stretch
    "best-of-n": return the surest chain
    "borda":     rank chains by certainty, the surest first; the vote of rank r counts (k - r + 1) ** power
                 return the surest chain of the answer with most weight

z are the raw logits, before temperature, penalties and masks. A chain without an answer to compare keeps its rank but
has no vote. Best-of-n serves what cannot be voted on, such as prose and programs; power 0 is majority@k. The lowest
window is DeepConf's measure of whole chains (arXiv:2508.15260, section 3), there of the 20 best log-probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

from pydantic import Field

from thinkserve.strategies.chains import Lane, Race
from thinkserve.strategies.confidence import Lowest, Mean, borda
from thinkserve.strategies.engine import Answer, Emit, Engine, Event, Task
from thinkserve.strategies.registry import LED, Options, Supports, strategy
from thinkserve.strategies.scale import scaled
from thinkserve.strategies.settle import Choice, by_vote, settle

# The paper's heuristic (section 5): few chains vote almost equally, many leave the decision to the sure ones.
FEW, MANY = (16, 0.3), (32, 1.2)


class SelfCertaintyOptions(Options):
    """Parameters of self-certainty."""

    k: int = Field(default=8, ge=1, le=64, description="How many chains are run.")
    select: Literal["borda", "best-of-n"] = Field(
        default="borda", description="Whether chains vote by rank of certainty, or the surest answers."
    )
    certainty: Literal["mean", "lowest-window"] = Field(
        default="mean", description="Of all tokens of a chain, or of its weakest stretch."
    )
    window: int | None = Field(
        default=None, ge=1, le=65_536, description="Tokens of a stretch; left out, 2048, or a small context's share."
    )
    power: float | None = Field(
        default=None,
        ge=0,
        le=16,
        allow_inf_nan=False,
        description="Exponent of a vote's weight; left out, 0.3 for up to 16 chains, rising to 1.2 for 32 and more.",
    )

    def chains(self) -> int:
        """All k run at once."""
        return self.k


@strategy(
    "self-certainty",
    title="Self-certainty",
    options=SelfCertaintyOptions,
    reference="arXiv:2502.18581",
    supports=Supports(stream=LED, over=True),
)
async def run(task: Task, engine: Engine, emit: Emit, options: SelfCertaintyOptions) -> Answer:
    """k chains run to their ends and vote by how certain they are, or the most certain one answers."""
    size = options.window or scaled(2048, engine.info().context)
    figure = Mean if options.certainty == "mean" else partial(Lowest, size)
    race = Race(task, engine, emit, options.k, figure=figure)
    await race.run()
    power = default_power(len(race.lanes)) if options.power is None else options.power
    choose = surest if options.select == "best-of-n" else partial(by_rank, power=power)
    return await settle(race, race.finished(), wanted=len(race.lanes), choose=choose)


async def surest(race: Race, voters: Sequence[Lane]) -> Choice:
    """The chain with the highest certainty, of equals the first."""
    best = max(voters, key=lambda lane: (lane.certainty.value, -lane.index))
    told = {lane.index: round(lane.certainty.value, 4) for lane in voters}
    await race.emit(Event("vote", None, {"certainty": told}))
    return Choice(best, f"certainty {best.certainty.value:.3f}, the highest of {len(voters)}")


async def by_rank(race: Race, voters: Sequence[Lane], power: float) -> Choice:
    """Borda vote: every chain is ranked, those with an answer vote."""
    lanes = race.left()
    weights = borda([lane.certainty.value for lane in lanes], power)
    return await by_vote(race, voters, {lane.index: weight for lane, weight in zip(lanes, weights, strict=True)})


def default_power(k: int) -> float:
    """The exponent for k chains: the paper's two, and a straight line in between."""
    (few, low), (many, high) = FEW, MANY
    share = min(1.0, max(0.0, (k - few) / (many - few)))
    return low + share * (high - low)
