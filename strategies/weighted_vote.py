"""Weighted vote: k chains run to their ends and vote, each with the weight that a reward model gives it.

    run k chains with seeds of their own to their ends
    value of a chain = last | min | prod | mean of the rewards of its steps
    weight of an answer = sum of the values of the chains that give it
    return the best chain of the weightiest answer

Verifier-weighted self-consistency (arXiv:2206.02336, section 3) with a process reward model. Against best of n it takes
many mistaken rewards, not one, to choose a wrong answer.
"""

from __future__ import annotations

from collections.abc import Sequence

from thinkserve.strategies.best_of_n import BestOfNOptions, rewarded
from thinkserve.strategies.chains import Lane, Race
from thinkserve.strategies.engine import Answer, Emit, Engine, Task
from thinkserve.strategies.registry import LED, Supports, strategy
from thinkserve.strategies.settle import Choice, by_vote, settle


class WeightedVoteOptions(BestOfNOptions):
    """Parameters of the weighted vote."""


@strategy(
    "weighted-vote",
    title="Weighted vote",
    options=WeightedVoteOptions,
    reference="arXiv:2206.02336",
    roles=("target", "reward"),
    supports=Supports(stream=LED, over=True),
)
async def run(task: Task, engine: Engine, emit: Emit, options: WeightedVoteOptions) -> Answer:
    """k chains run to their ends and vote with weights from a process reward model."""

    async def weighted(race: Race, voters: Sequence[Lane]) -> Choice:
        return await by_vote(race, voters, await rewarded(race, voters, options) or {})

    race = Race(task, engine, emit, options.k)
    await race.run()
    return await settle(race, race.finished(), wanted=len(race.lanes), choose=weighted)
