"""A*-decoding: best-first search over steps, guided by a process reward model (arXiv:2505.13672).

    open = { root },  g(root) = h(root) = 0
    repeat: n = the open node with the least f = g + h; of equals the deeper, then the older
            if n is a complete solution: return it
            for each of k continuations s of n by one step:
                h(s) = 1 - reward(s),  g(s) = g(n) + c(n, s);  s becomes open
    when a limit ends this: the complete solution with the least f, then the highest reward; else what would come next

The edge cost c is not in what we could read of the paper. "consistent", max(0, h(n) - h(s)), is the least cost with
which h never overestimates a step, so that f grows along a path by exactly the rewards it loses, and the first solution
popped is the best of all. "increase", max(0, h(s) - h(n)), is a survey's wording; f may fall, and nothing is promised.

The root, on which nothing can be wrong yet, has reward 1. (With h(root) = 1 the first step would be free: a path whose
rewards are low from the start, and stay so, would cost nothing.)  With `aggregate` "min" or "prod" h never falls along
a path, so f = h: a reward model's noise does not add up, and depth is not punished.

Steps that are still to come will lose rewards, too, of which h, the paper's, knows nothing: so short paths look better
than they are, and the search goes back more often than it need. `ahead` is what each of these steps is expected to
lose. As only differences count, depth is subtracted instead; a complete solution, with nothing ahead, is as deep as the
deepest node. It is 0 in the paper; with more nothing is promised of the first solution.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heapify, heappop, heappush
from typing import Literal

from pydantic import Field

from thinkserve.strategies.engine import Answer, Emit, Engine, Task
from thinkserve.strategies.registry import Supports, strategy
from thinkserve.strategies.rewards import RewardOptions
from thinkserve.strategies.tree import Tree
from thinkserve.strategies.tree_budget import TreeOptions, limits
from thinkserve.strategies.tree_node import Node

Edge = Literal["consistent", "increase"]
# (rank, -depth, order of making, node)
Entry = tuple[float, int, int, Node]


class AStarOptions(RewardOptions, TreeOptions):
    """Parameters of A*-decoding."""

    k: int = Field(default=4, ge=1, le=64, description="Continuations of each expanded node.")
    edge: Edge = Field(
        default="consistent", description="Cost of a step: the reward it gains (h stays consistent), or loses."
    )
    ahead: float = Field(
        default=0.0,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="Reward that a step still to come is expected to lose; the more, the less the search goes back.",
    )
    max_expansions: int = Field(default=64, ge=1, le=4096, description="How many nodes may be expanded.")
    max_open: int = Field(default=1024, ge=1, le=65_536, description="How many nodes may wait; the worst are given up.")

    def chains(self) -> int:
        """The continuations of one node are written side by side."""
        return self.k


# By how much f = g + h changes from a node to its child, given the increase of h. Said in one sum, so that rounding
# cannot make f fall: with c = max(0, -increase) it is c + increase, with c = max(0, increase) likewise.
CHANGE: dict[Edge, Callable[[float], float]] = {
    "consistent": lambda increase: max(0.0, increase),
    "increase": lambda increase: increase + max(0.0, increase),
}


@strategy(
    "a-star",
    title="A*-decoding",
    options=AStarOptions,
    reference="arXiv:2505.13672",
    roles=("target", "reward"),
    supports=Supports(parts=True),
)
async def run(task: Task, engine: Engine, emit: Emit, options: AStarOptions) -> Answer:
    """Best-first search over steps by a process reward model; the first complete solution reached answers."""
    bounds = limits(task, engine, options, expansions=options.max_expansions, nodes=options.max_open)
    tree = Tree(task, engine, emit, bounds, options)
    root = await tree.start()
    h, f = {root: 0.0}, {root: 0.0}
    heap: list[Entry] = [(0.0, 0, 0, root)]
    deepest = 0

    def rank(node: Node) -> float:
        return f[node] - options.ahead * (deepest if node.terminal else node.depth)

    while heap and not tree.over:
        node = heappop(heap)[-1]
        if node.terminal:
            return await tree.answer(node, f"the first solution reached, f = {f[node]:.3f}")
        children = await tree.expand({node: options.k}) if node.open else []
        if children and node.depth >= deepest:
            deepest = node.depth + 1
            # Against it solutions have gained.
            heap = [(rank(each), -each.depth, number, each) for *_, number, each in heap]
            heapify(heap)
        for child in children:
            h[child] = 1.0 - tree.value(child)
            f[child] = f[node] + CHANGE[options.edge](h[child] - h[node])
            heappush(heap, (rank(child), -child.depth, len(f), child))
        await _shrink(tree, heap)
    best = min(tree.ends, key=lambda node: (not node.terminal, rank(node), h[node], -node.length))
    return await tree.answer(best, f"the best of what is there, f = {f[best]:.3f}", decided=tree.over is None)


async def _shrink(tree: Tree, heap: list[Entry]) -> None:
    """Give the worst open nodes up."""
    most = tree.limits.nodes or len(heap)
    if len(heap) > most:
        heap.sort()
        for *_, node in heap[most:]:
            await tree.prune(node, "too many open nodes")
        del heap[most:]
