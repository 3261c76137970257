"""REBASE: how proposals are shared out."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies.worlds import World, search, told
from thinkserve.strategies.rebase import allocate


@pytest.mark.parametrize(
    ("rewards", "shares"),
    [
        ([0.9, 0.8, 0.5, 0.1], [10, 5, 1, 0]),
        ([0.1, 0.5, 0.9, 0.8], [0, 1, 10, 5]),
        ([0.7] * 4, [4, 4, 4, 4]),
        ([0.7] * 3, [6, 5, 5]),
        ([0.3], [16]),
        ([], []),
    ],
)
def test_sixteen_proposals_by_reward(rewards: list[float], shares: list[int]) -> None:
    """Fixtures at the paper's temperature."""
    assert shares == allocate(rewards, 16, 0.2)


@given(
    rewards=st.lists(st.floats(0, 1), min_size=1, max_size=40),
    budget=st.integers(0, 64),
    balance=st.floats(1e-6, 100),
)
def test_shares_sum_to_the_budget(rewards: list[float], budget: int, balance: float) -> None:
    """Exactly, none is negative, and who is rewarded more gets no less, but for one that rounding up has cost."""
    shares = allocate(rewards, budget, balance)

    assert budget == sum(shares)
    assert min(shares) >= 0
    ranked = [share for _, share in sorted(zip(rewards, shares, strict=True), key=lambda pair: -pair[0])]
    assert all(a + 1 >= b for a, b in pairwise(ranked))


def test_rounding_gives_nobody_one_more() -> None:
    """Three equal shares of nine: the quotient of the first is a little more than three."""
    assert [5, 5, 3, 3, 3] == allocate([0.9, 0.9, 0.5, 0.5, 0.5], 19, 1.0)


def test_a_small_balance_gives_everything_to_the_best() -> None:
    """And a large one about the same to all, the best being served first."""
    assert [0, 8, 0, 0] == allocate([0.5, 0.51, 0.5, 0.5], 8, 1e-4)
    assert [1, 3, 2, 2] == allocate([0.1, 0.9, 0.5, 0.5], 8, 100)


def test_the_search_follows_the_shares() -> None:
    """Sixteen proposals, of which four different ones; then ten, five and one; the last is pruned."""
    rewards = {"a\n\n": 0.9, "b\n\n": 0.8, "c\n\n": 0.5, "d\n\n": 0.1}
    world = World(
        {"": ("a\n\n", "b\n\n", "c\n\n", "d\n\n"), **{text: tuple(map(str, range(1, 17))) for text in rewards}}, rewards
    )

    _, out = search("rebase", world, width=4)

    assert {"": 4, "a\n\n": 3, "b\n\n": 1} == dict(world.visits)
    assert [3, 4] == [event["node"] for event in told(out, "node.pruned")]


def test_every_solution_takes_one_proposal_with_it() -> None:
    """Four at first, one complete: three for what is open; the answers of all four vote with their rewards."""
    steps = {"": ("1", "a\n\n", "b\n\n", "c\n\n"), "a\n\n": ("2", "2", "so 2")}
    world = World(steps, {"1": 0.9, "a\n\n": 0.9, "b\n\n": 0.1, "c\n\n": 0.1, "a\n\n2": 0.4, "a\n\nso 2": 0.3})

    answer, out = search("rebase", world, width=4, balance=0.05)

    assert {"": 4, "a\n\n": 3} == dict(world.visits)
    assert {"2": 3, "1": 1} == dict(answer.votes)
    assert {"2": pytest.approx(1.1), "1": 0.9} == told(out, "vote")[0]["weights"]
