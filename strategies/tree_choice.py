"""From the complete solutions of a search to its answer: the best one, or a vote."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from thinkserve.strategies.engine import Answer, Event
from thinkserve.strategies.text import answer_of
from thinkserve.strategies.tree import REWARDS, Tree
from thinkserve.strategies.tree_node import Node
from thinkserve.strategies.voting import Ballot, vote

Select = Literal["weighted", "best", "majority"]
SELECT = "Which solution answers: by vote weighted with rewards, the one rewarded best, or by plain vote."


async def conclude(
    tree: Tree,
    leaves: Sequence[Node],
    frontier: Sequence[Node],
    select: Select,
    *,
    weight: Callable[[Node], float] | None = None,
    decided: bool = False,
) -> Answer:
    """Let complete solutions decide by their weights (left out: rewards); without any, finish the best of `frontier`.

    A solution that was written twice may be in `leaves` twice. An empty `frontier` stands for all ends of the tree.
    `decided`: nothing was left to propose when a limit was reached, if one was.
    """
    weigh = weight or tree.value
    decided = tree.over is None or (decided and not tree.curtailed and tree.over != REWARDS)
    if not leaves:
        node = max(frontier or tree.ends, key=lambda node: (weigh(node), node.length))
        return await tree.answer(node, "the best of what is there", decided=decided)
    if select == "best":
        node = max(leaves, key=weigh)
        reason = f"rated {weigh(node):.3f}, the best of {len(leaves)} solutions"
        return await tree.answer(node, reason, decided=decided)
    verdict = await vote(
        Ballot(index, leaf.length, said(tree, leaf), weigh(leaf) if select == "weighted" else 1.0)
        for index, leaf in enumerate(leaves)
    )
    told = {"votes": dict(verdict.votes), "weights": dict(verdict.weights), "voters": [leaf.id for leaf in leaves]}
    await tree.emit(Event("vote", None, told))
    votes = next(iter(verdict.votes.values()), 0)
    reason = f"{votes} of {len(leaves)} votes" if votes else f"no answer to compare in {len(leaves)} solutions"
    return await tree.answer(leaves[verdict.winner.index], reason, verdict.votes, decided=decided)


def said(tree: Tree, leaf: Node) -> str | None:
    """What a solution gives as its answer."""
    return answer_of(tree.engine.decode(tree.transcript(leaf).answer))
