"""Monte-Carlo tree search over steps, a process reward model in place of rollouts (arXiv:2502.07191).

    repeat until the current node is complete:
        `simulations` times:
            go down from the current node: an unvisited child first, else the one with the highest
                Q(c) + (c_init + ln((N + c_base + 1) / c_base)) * sqrt(N) / (1 + n(c))
            write `width` continuations of the leaf and score them; their mean reward is the value of the leaf
            back up: every node on the way gets one visit and the value; Q is the mean
        commit to the most visited child

N are the visits of the parent, n those of the child; there is no prior from the model. The published code backs up the
value of one child chosen at random; here the scores of all of them enter. A complete solution at the end of the way is
worth its own reward, a step behind which nothing can be written nothing. What is known below the child stays known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import log, sqrt

from pydantic import Field

from thinkserve.strategies.engine import Answer, Emit, Engine, Task
from thinkserve.strategies.registry import Supports, strategy
from thinkserve.strategies.rewards import RewardOptions, mean
from thinkserve.strategies.tree import REWARDS, Tree
from thinkserve.strategies.tree_budget import TreeOptions, limits
from thinkserve.strategies.tree_choice import conclude
from thinkserve.strategies.tree_node import Node, slots


class MctsOptions(RewardOptions, TreeOptions):
    """Parameters of Monte-Carlo tree search."""

    width: int = Field(default=5, ge=1, le=64, description="Continuations of a leaf.")
    simulations: int = Field(default=5, ge=1, le=256, description="Simulations before each step is committed to.")
    c_init: float = Field(default=1.25, ge=0, le=100, allow_inf_nan=False, description="How much exploration counts.")
    c_base: float = Field(
        default=19652,
        gt=0,
        le=1e9,
        allow_inf_nan=False,
        description="Visits at which exploration begins to count more.",
    )
    max_expansions: int = Field(default=128, ge=1, le=4096, description="How many leaves may be expanded.")

    def chains(self) -> int:
        """The continuations of one leaf are written side by side."""
        return self.width


@strategy(
    "mcts",
    title="MCTS",
    options=MctsOptions,
    reference="arXiv:2502.07191",
    roles=("target", "reward"),
    supports=Supports(parts=True),
)
async def run(task: Task, engine: Engine, emit: Emit, options: MctsOptions) -> Answer:
    """Monte-Carlo tree search over steps by a process reward model, committing to one step after the other."""
    bounds = limits(task, engine, options, expansions=options.max_expansions)
    tree = Tree(task, engine, emit, bounds, options)
    search = Search(tree, options)
    here = await tree.start()
    cut = False
    while not here.terminal and not tree.over:
        for _ in range(options.simulations):
            # A leaf that could not be expanded any more says nothing.
            if cut := tree.over is not None:
                break
            await search.simulate(here)
        step = search.most_visited(here)
        if step is None:
            break
        here = step
    if here.terminal and not cut and tree.over != REWARDS:
        return await tree.answer(here, f"committed to step by step, reward {tree.value(here):.3f}")
    return await conclude(tree, [node for node in tree.nodes if node.terminal], [here], "best")


@dataclass(slots=True)
class Record:
    """What the simulations know of a node."""

    visits: int = 0
    total: float = 0.0
    children: list[Node] = field(default_factory=list[Node])

    @property
    def q(self) -> float:
        """Mean value; 0 before the first visit."""
        return self.total / self.visits if self.visits else 0.0


class Search:
    """The simulations over one tree, and what they have found."""

    def __init__(self, tree: Tree, options: MctsOptions) -> None:
        self.records: dict[Node, Record] = {tree.root: Record()}
        self._tree, self._options = tree, options

    async def simulate(self, start: Node) -> None:
        """Down from `start`, expand, evaluate, back up."""
        way = [start]
        while self.records[way[-1]].children:
            way.append(self.choose(way[-1]))
        backup([self.records[node] for node in way], await self._evaluate(way[-1]))

    def choose(self, parent: Node) -> Node:
        """The child to go down to: unvisited ones first, best reward first, else the best by PUCT."""
        record = self.records[parent]
        unvisited = [child for child in record.children if not self.records[child].visits]
        if unvisited:
            return max(unvisited, key=self._tree.value)
        weight = exploration(record.visits, self._options.c_init, self._options.c_base) * sqrt(record.visits)

        def puct(child: Node) -> float:
            return self.records[child].q + weight / (1 + self.records[child].visits)

        return max(record.children, key=puct)

    def most_visited(self, node: Node) -> Node | None:
        """The child to commit to, of equally visited ones the better; None without children."""
        return max(self.records[node].children, key=self._merit, default=None)

    def _merit(self, node: Node) -> tuple[int, float, float]:
        return self.records[node].visits, self.records[node].q, self._tree.value(node)

    async def _evaluate(self, leaf: Node) -> float:
        if leaf.terminal:
            return self._tree.value(leaf)
        children = await self._tree.expand({leaf: self._options.width}) if leaf.open else []
        self.records |= {child: Record() for child in children}
        self.records[leaf].children = children
        return mean([self._tree.value(child) for child in slots(children)])


def exploration(visits: int, c_init: float, c_base: float) -> float:
    """The constant of PUCT, which grows slowly with the visits of the parent."""
    return c_init + log((visits + c_base + 1) / c_base)


def backup(way: Sequence[Record], value: float) -> None:
    """One visit and the value for every node on the way."""
    for record in way:
        record.visits += 1
        record.total += value
