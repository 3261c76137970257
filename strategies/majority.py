"""Self-consistency: k chains run to their ends, the answer with the most votes wins (arXiv:2203.11171).

    run k chains with seeds of their own
    wait for all of them
    group equal answers; the largest group wins, a tie goes to the group with the shortest thinking
    return that group's shortest chain

It is short-m@k with m = k, and what that is measured against.
"""

from __future__ import annotations

from pydantic import Field

from thinkserve.strategies.chains import Race
from thinkserve.strategies.engine import Answer, Emit, Engine, Task
from thinkserve.strategies.registry import LED, Options, Supports, strategy
from thinkserve.strategies.settle import settle


class MajorityOptions(Options):
    """Parameters of majority@k."""

    k: int = Field(default=8, ge=1, le=64, description="How many chains vote.")

    def chains(self) -> int:
        """All k run at once."""
        return self.k


@strategy(
    "majority",
    title="majority@k",
    options=MajorityOptions,
    reference="arXiv:2203.11171",
    supports=Supports(stream=LED, over=True),
)
async def run(task: Task, engine: Engine, emit: Emit, options: MajorityOptions) -> Answer:
    """k chains run to their ends; the most frequent answer wins, in the words of its shortest chain."""
    race = Race(task, engine, emit, options.k)
    await race.run()
    return await settle(race, race.finished(), wanted=len(race.lanes))
