"""A node of the search tree: one step of a solution, and by its parents the whole of it.

Nodes know nothing of how they are searched: f and g, visits and weights belong to the strategies.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain

from thinkserve.strategies.engine import Delta, Finish, Tokens


@dataclass(eq=False, slots=True)
class Node:
    """One step: what was written (`own`), its text cut into steps, and where it hangs.

    `length` counts the tokens from the prompt to the end of this node, `left` those that the chain may still have: none
    behind a dead end, which is what ends inside its thinking.
    `rewards` are those of all steps of the path, `count` is how many proposals wrote this same text. `terminal`: the
    solution is complete. `finish` says how the step ended; "stop" of an open node is the blank line. `chain`: which of
    the request's chains it is a part of; a node's first proposal goes on with its chain, the others begin their own.
    """

    id: int
    parent: Node | None
    seed: int | None
    own: Delta = field(default_factory=Delta)
    steps: tuple[str, ...] = ()
    length: int = 0
    left: int = 0
    terminal: bool = False
    finish: Finish = "stop"
    count: int = 1
    rewards: tuple[float, ...] = ()
    proposed: int = 0
    chain: int = 0
    depth: int = field(init=False)

    def __post_init__(self) -> None:
        self.depth = 0 if self.parent is None else self.parent.depth + 1

    @property
    def open(self) -> bool:
        """Whether more can be written behind it."""
        return not self.terminal and self.left > 0 and self.finish in {"stop", "length"}

    @property
    def dead(self) -> bool:
        """Whether it came to its end inside its thinking."""
        return not self.terminal and self.left == 0 and self.finish == "stop"

    @property
    def text(self) -> str:
        """Its own text."""
        return "".join(self.steps)

    @property
    def line(self) -> list[Node]:
        """The nodes from the root to this one."""
        nodes = [self]
        while (parent := nodes[-1].parent) is not None:
            nodes.append(parent)
        return nodes[::-1]

    @property
    def tokens(self) -> Tokens:
        """All tokens behind the prompt."""
        return tuple(chain.from_iterable(node.own.tokens for node in self.line))

    @property
    def path(self) -> tuple[str, ...]:
        """The text of all steps."""
        return tuple(chain.from_iterable(node.steps for node in self.line))


def slots(nodes: list[Node]) -> list[Node]:
    """Every node as often as it was proposed: merged duplicates count as the samples that they are."""
    return [node for node in nodes for _ in range(node.count)]
