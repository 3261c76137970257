"""Diverse verifier tree search: beam search in independent subtrees (search-and-learn, with arXiv:2408.03314).

    n / m subtrees, each begun by m continuations of the root
    every subtree by itself: keep the best of its m steps, write m continuations of it, until the best one is complete
    the complete solutions among the last m of every subtree vote, or the best of them answers; without any, all do

Subtrees share nothing, so a reward model that is fooled in one does not narrow the others. After the first step they
also run at their own pace: none waits for another's slowest step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field, ValidationInfo, field_validator, model_validator

from thinkserve.strategies.engine import Answer, Emit, Engine, Task
from thinkserve.strategies.registry import Supports, strategy
from thinkserve.strategies.rewards import RewardOptions
from thinkserve.strategies.together import together
from thinkserve.strategies.tree import Tree
from thinkserve.strategies.tree_budget import TreeOptions, limits
from thinkserve.strategies.tree_choice import SELECT, Select, conclude
from thinkserve.strategies.tree_node import Node, slots


class DvtsOptions(RewardOptions, TreeOptions):
    """Parameters of diverse verifier tree search."""

    n: int = Field(default=8, ge=1, le=64, description="How many steps are written side by side, in all subtrees.")
    m: int = Field(
        default=4,
        ge=1,
        le=64,
        description="Steps of one subtree, of which the best is kept; divides n. Left out, 4, or less if 4 does not.",
    )
    select: Select = Field(default="weighted", description=SELECT)

    @model_validator(mode="before")
    @classmethod
    def _m_left_out(cls, given: Any) -> Any:
        # Validators of a field do not look at its default.
        if isinstance(given, dict) and "m" not in given and isinstance(n := given.get("n"), int):
            return {**given, "m": next(m for m in (4, 3, 2, 1) if n % m == 0)}
        return given

    @field_validator("m")
    @classmethod
    def _m_divides_n(cls, m: int, info: ValidationInfo) -> int:
        if info.data.get("n", m) % m:
            raise ValueError(f"m must divide n ({info.data['n']})")
        return m

    def chains(self) -> int:
        """All subtrees go on at once."""
        return self.n


@strategy(
    "dvts",
    title="DVTS",
    options=DvtsOptions,
    reference="arXiv:2408.03314",
    roles=("target", "reward"),
    supports=Supports(parts=True),
)
async def run(task: Task, engine: Engine, emit: Emit, options: DvtsOptions) -> Answer:
    """Independent subtrees, in each of which the best of m steps is gone on with."""
    tree = Tree(task, engine, emit, limits(task, engine, options), options)
    first = slots(await tree.expand({await tree.start(): options.n}))
    subtrees = [Subtree(first[at : at + options.m], options.m) for at in range(0, len(first), options.m)]
    branches = tree.branches(len(subtrees))
    await together(lambda pair: pair[0].grow(pair[1]), zip(subtrees, branches, strict=True))
    for branch in branches:
        tree.join(branch)
    leaves = [node for subtree in subtrees for node in subtree.last if node.terminal]
    bests = [subtree.best for subtree in subtrees]
    through = all(node.terminal for node in bests)
    # A limit may strike while every subtree goes on behind something better.
    return await conclude(tree, leaves or tree.solutions, bests, options.select, decided=through)


class Subtree:
    """The last steps of one subtree, and the best of them."""

    def __init__(self, steps: Sequence[Node], width: int) -> None:
        self.last = steps
        self.best = steps[0]
        self._width = width

    async def grow(self, tree: Tree) -> None:
        """Go on from the best step until it is complete, or nothing more can be written."""
        while True:
            # Nothing follows a dead end, however good it is.
            alive = [node for node in self.last if node.terminal or node.open]
            self.best = max(alive or self.last, key=tree.value)
            steps = await tree.expand({self.best: self._width}) if self.best.open else []
            if not steps:
                return
            self.last = slots(steps)
