"""Beam search over steps by a process reward model (arXiv:2408.03314, section 5; as in search-and-learn).

    n slots, all at the root
    repeat: every slot is continued by one step, the steps are scored
            complete solutions leave, each with its slot
            of the others the best 1 in m are kept, and replicated until all slots that are left are taken
    the complete solutions vote, or the best of them answers

The published code refills to n slots whatever has been completed; here every solution uses up a slot, so there are n of
them at the end, and with m = 1 and equal rewards this is n plain samples. Two slots that write the same step are two
(the code's default as well), though the engine and the reward model see them once.
"""

from __future__ import annotations

from collections import Counter
from itertools import cycle, islice

from pydantic import Field

from thinkserve.strategies.engine import Answer, Emit, Engine, Task
from thinkserve.strategies.registry import Supports, strategy
from thinkserve.strategies.rewards import RewardOptions
from thinkserve.strategies.tree import Tree
from thinkserve.strategies.tree_budget import TreeOptions, limits
from thinkserve.strategies.tree_choice import SELECT, Select, conclude
from thinkserve.strategies.tree_node import Node, slots


class BeamOptions(RewardOptions, TreeOptions):
    """Parameters of beam search."""

    n: int = Field(default=4, ge=1, le=64, description="How many solutions are written side by side.")
    m: int = Field(default=4, ge=1, le=64, description="Beam width: of so many steps one is kept.")
    select: Select = Field(default="weighted", description=SELECT)

    def chains(self) -> int:
        """All slots are continued at once."""
        return self.n


@strategy(
    "beam",
    title="Beam search",
    options=BeamOptions,
    reference="arXiv:2408.03314",
    roles=("target", "reward"),
    supports=Supports(parts=True),
)
async def run(task: Task, engine: Engine, emit: Emit, options: BeamOptions) -> Answer:
    """n solutions grow step by step; after each step the best are kept and replicated."""
    tree = Tree(task, engine, emit, limits(task, engine, options), options)
    beams, leaves = [await tree.start()] * options.n, list[Node]()
    while beams and not tree.over:
        steps = await tree.expand(Counter(beams))
        leaves += [step for step in steps if step.terminal]
        ranked = sorted(slots([step for step in steps if step.open]), key=tree.value, reverse=True)
        kept = ranked[: -(-len(ranked) // options.m)]
        for node in dict.fromkeys(ranked[len(kept) :]):
            if node not in kept:
                await tree.prune(node, "beam")
        beams = list(islice(cycle(kept), options.n - len(slots(leaves)) if kept else 0))
    return await conclude(tree, slots(leaves), beams, options.select, decided=not beams)
