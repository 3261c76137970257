"""MCTS: the constant, the backups by hand, the order of visits, and what is committed to."""

from __future__ import annotations

import anyio
import pytest

from tests.strategies.worlds import World, search, text_of, told
from thinkserve.strategies.mcts import MctsOptions, Record, Search, backup, exploration
from thinkserve.strategies.testing import Recorder
from thinkserve.strategies.tree import Tree
from thinkserve.strategies.tree_budget import limits

TOY = {"": ("a\n\n", "b\n\n"), "a\n\n": ("c\n\n", "d\n\n"), "b\n\n": ("e\n\n", "f\n\n")}
WORTH = {"a\n\n": 0.4, "b\n\n": 0.6, "a\n\nc\n\n": 1.0, "a\n\nd\n\n": 0.8, "b\n\ne\n\n": 0.2, "b\n\nf\n\n": 0.1}


@pytest.mark.parametrize(("visits", "constant"), [(5, 1.25030), (0, 1.25005), (19652, 1.25 + 0.69317)])
def test_the_constant_of_puct(visits: int, constant: float) -> None:
    """At N = 5 it is 1.25030, and it grows with the logarithm."""
    assert constant == pytest.approx(exploration(visits, 1.25, 19652), abs=1e-5)


def test_backups_by_hand() -> None:
    """Two values of three visits: means along the way."""
    root, left, right = Record(), Record(), Record()

    backup([root], 0.5)
    backup([root, left], 0.9)
    backup([root, right], 0.1)
    backup([root, left], 0.7)

    assert [4, 2, 1] == [each.visits for each in (root, left, right)]
    assert [0.55, 0.8, 0.1] == pytest.approx([each.q for each in (root, left, right)])
    assert 0.0 == Record().q


def simulated(count: int, **options: float) -> tuple[Search, World]:
    """A search of so many simulations in the toy world."""
    world = World(TOY, WORTH)
    chosen = MctsOptions.model_validate({"width": 2} | options)
    tree = Tree(world.task(), world, Recorder(), limits(world.task(), world, chosen))
    search = Search(tree, chosen)

    async def go() -> None:
        for _ in range(count):
            await search.simulate(tree.root)

    anyio.run(go)
    return search, world


def test_the_mean_of_all_children_is_backed_up() -> None:
    """By hand: the root expands (.5), then b, rewarded better (.15), then a, not visited yet (.9)."""
    search, world = simulated(3)
    root = search.records[search._tree.root]
    by_text = {node.text: record for node, record in search.records.items()}

    known = [root, by_text["a\n\n"], by_text["b\n\n"]]
    assert [3, 1, 1] == [record.visits for record in known]
    assert [(0.5 + 0.15 + 0.9) / 3, 0.9, 0.15] == pytest.approx([record.q for record in known])
    assert ["", "b\n\n", "a\n\n"] == list(world.visits)


def test_unvisited_children_come_first() -> None:
    """However good the visited one is: after two simulations each child of the root has been visited at most once."""
    search, _ = simulated(3, c_init=0.0)
    children = search.records[search._tree.root].children

    assert [1, 1] == [search.records[child].visits for child in children]


def test_visits_sum_to_the_simulations() -> None:
    """All of the root's, and below every node all but its own expansion."""
    search, _ = simulated(9)
    root = search.records[search._tree.root]

    assert 9 == root.visits
    for record in search.records.values():
        below = sum(search.records[child].visits for child in record.children)
        assert not record.children or below == record.visits - 1


def test_the_most_visited_child_is_committed_to() -> None:
    """Exploration is cheap, so the better child gets the visits, although it looked worse at first."""
    search, _ = simulated(9, c_init=0.1)
    chosen = search.most_visited(search._tree.root)

    assert chosen is not None
    assert "a\n\n" == chosen.text


def test_the_known_optimum_of_a_toy_tree_is_found() -> None:
    """Down the better branch to its better end; what was learnt below the committed child is kept."""
    ends: dict[str, tuple[str, ...]] = {"a\n\nc\n\n": ("1", "0"), "a\n\nd\n\n": ("0",)}
    world = World({**TOY, **ends}, WORTH | {"a\n\nc\n\n1": 1.0, "a\n\nc\n\n0": 0.1})

    answer, out = search("mcts", world, width=2, simulations=6, c_init=0.3)

    assert "a\n\nc\n\n1" == text_of(world, answer)
    assert "committed to step by step" in answer.reason
    assert 1 == [event["node"] for event in told(out, "node.expanded")].count(0)


def test_a_limit_returns_the_best_solution_seen() -> None:
    """Not where the search stood, if something is complete."""
    world = World({"": ("x\n\n", "y"), "x\n\n": ("x\n\n",)}, lambda text: 0.9 if "x" in text else 0.3)

    answer, _ = search("mcts", world, width=2, simulations=2, max_expansions=2)

    assert "y" == text_of(world, answer)
    assert "stopped by its limit of expansions" in answer.reason


def test_what_was_cut_short_in_its_simulations_has_not_been_committed_to() -> None:
    """The better solution that was seen elsewhere answers, and the limit is told."""
    steps = {"": ("x\n\n", "y"), "x\n\n": ("z", "x\n\n")}
    world = World(steps, lambda text: {"x\n\n": 0.5, "y": 0.6, "x\n\nz": 0.9}.get(text, 0.0))

    answer, _ = search("mcts", world, width=2, simulations=9, max_expansions=2, c_init=0.0)

    assert "x\n\nz" == text_of(world, answer)
    assert ("budget", True) == (answer.stopped_by, "stopped by its limit of expansions" in answer.reason)
