"""REBASE: reward-balanced search shares a fixed number of proposals out over all open steps (arXiv:2408.00724).

    B = width proposals from the root
    repeat: the complete solutions leave, each takes one of the B with it
            the open steps, highest reward first, get  n_j = ceil(B_left * w_j / sum of the w not yet served)  proposals
            with w = softmax(reward / balance);  B_left -= n_j, so the n_j sum to B exactly
    the complete solutions vote with their rewards, or the best of them answers

Steps that get no proposal are pruned. `balance` is the paper's temperature: small, and the best step gets everything;
large, and all get the same. The limit of tokens is that of the chain; the published code limits every node.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import ceil, exp

from pydantic import Field

from thinkserve.strategies.engine import Answer, Emit, Engine, Task
from thinkserve.strategies.registry import Supports, strategy
from thinkserve.strategies.rewards import RewardOptions
from thinkserve.strategies.tree import Tree
from thinkserve.strategies.tree_budget import TreeOptions, limits
from thinkserve.strategies.tree_choice import SELECT, Select, conclude
from thinkserve.strategies.tree_node import Node, slots

# What a quotient may be too large by rounding: it must not become one proposal more.
NOISE = 1e-9


class RebaseOptions(RewardOptions, TreeOptions):
    """Parameters of REBASE."""

    width: int = Field(default=16, ge=1, le=64, description="Proposals of the first step: solutions at the end.")
    balance: float = Field(
        default=0.2,
        gt=0,
        le=100,
        allow_inf_nan=False,
        description="Small: proposals go to the best steps; large: to all.",
    )
    select: Select = Field(default="weighted", description=SELECT)

    def chains(self) -> int:
        """All proposals are written at once."""
        return self.width


@strategy(
    "rebase",
    title="REBASE",
    options=RebaseOptions,
    reference="arXiv:2408.00724",
    roles=("target", "reward"),
    supports=Supports(parts=True),
)
async def run(task: Task, engine: Engine, emit: Emit, options: RebaseOptions) -> Answer:
    """A fixed number of proposals, shared out over all open steps by their rewards."""
    tree = Tree(task, engine, emit, limits(task, engine, options), options)
    proposals, leaves = Counter({await tree.start(): options.width}), list[Node]()
    while proposals and not tree.over:
        steps = await tree.expand(proposals)
        leaves += [step for step in steps if step.terminal]
        waiting = slots([step for step in steps if step.open])
        shares = allocate([tree.value(step) for step in waiting], options.width - len(slots(leaves)), options.balance)
        proposals = Counter[Node]()
        for step, share in zip(waiting, shares, strict=True):
            proposals[step] += share
        for step in [step for step, share in proposals.items() if not share]:
            del proposals[step]
            await tree.prune(step, "no share")
    return await conclude(tree, slots(leaves), list(proposals), options.select, decided=not proposals)


def allocate(rewards: Sequence[float], budget: int, balance: float) -> list[int]:
    """How many of `budget` proposals each step gets; they sum to `budget`, as long as there is a step."""
    top = max(rewards, default=0.0)
    weights = [exp((reward - top) / balance) for reward in rewards]
    order = sorted(range(len(rewards)), key=lambda at: -weights[at])
    shares, left, rest = [0] * len(rewards), budget, sum(weights)
    for place, at in enumerate(order):
        if left <= 0:
            break
        last = place == len(order) - 1
        shares[at] = left if last else min(left, ceil(left * weights[at] / rest - NOISE))
        left, rest = left - shares[at], sum(weights[later] for later in order[place + 1 :])
    return shares
