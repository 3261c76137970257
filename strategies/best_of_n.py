"""Best of n: k chains run to their ends, a process reward model reads each once, the best one answers.

    run k chains with seeds of their own to their ends
    value of a chain = last | min | prod | mean of the rewards of its steps
    return the chain with the highest value, of equals the first

The baseline of every search by rewards (see Let's Verify Step by Step, arXiv:2305.20050, for min and product). A chain
is cut into steps at its blank lines, its answer being the last of them; all chains are scored in one batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import Field

from thinkserve.strategies.chains import Lane, Race
from thinkserve.strategies.engine import Answer, Emit, Engine, Event, Path, Task
from thinkserve.strategies.errors import LOST
from thinkserve.strategies.registry import LED, Supports, strategy
from thinkserve.strategies.rewards import UNREAD, RewardOptions, aggregated, cleaned, solution_steps, unread
from thinkserve.strategies.settle import Choice, by_vote, settle

UNSCORED = "time was over before the chains could be scored; they voted"
NOTHING_READ = "the reward model could not rate the chains (too long for it, or no number); they voted"


class BestOfNOptions(RewardOptions):
    """Parameters of best of n."""

    k: int = Field(default=8, ge=1, le=64, description="How many chains are run.")

    def chains(self) -> int:
        """All k run at once."""
        return self.k


@strategy(
    "best-of-n",
    title="Best of n",
    options=BestOfNOptions,
    reference="arXiv:2305.20050",
    roles=("target", "reward"),
    supports=Supports(stream=LED, over=True),
)
async def run(task: Task, engine: Engine, emit: Emit, options: BestOfNOptions) -> Answer:
    """k chains run to their ends; the one that a process reward model likes best answers."""

    async def best(race: Race, voters: Sequence[Lane]) -> Choice:
        values = await rewarded(race, voters, options)
        if values is None:
            return await by_vote(race, voters)
        winner = max(voters, key=lambda lane: (values[lane.index], -lane.index))
        return Choice(winner, f"reward {values[winner.index]:.3f}, the highest of {len(voters)}")

    race = Race(task, engine, emit, options.k)
    await race.run()
    return await settle(race, race.finished(), wanted=len(race.lanes), choose=best)


async def rewarded(race: Race, lanes: Sequence[Lane], options: RewardOptions) -> Mapping[int, float] | None:
    """What the reward model says of each chain, by index, told as an event; None, with a warning, if it says nothing.

    That is when time is over, or when it has failed and `on_reward_error` lets the chains vote.
    """
    lanes = sorted(lanes, key=lambda lane: lane.index)
    texts = [race.engine.decode(lane.transcript.tokens) for lane in lanes]
    try:
        scores = await race.engine.score(race.task.question, [Path(solution_steps(text)) for text in texts])
    except TimeoutError:
        race.warnings.append(UNSCORED)
        return None
    except LOST as error:
        race.warnings.append(options.lose(error))
        return None
    values = [aggregated(cleaned(score.rewards), options.aggregate) for score in scores]
    if unread(scores):
        if not any(values):
            race.warnings.append(NOTHING_READ)
            return None
        race.warnings.append(UNREAD)
    known = {lane.index: value for lane, value in zip(lanes, values, strict=True)}
    for lane in lanes:
        await race.emit(Event("node.scored", lane.index, {"node": lane.index, "reward": round(known[lane.index], 4)}))
    return known
