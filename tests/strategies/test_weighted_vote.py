"""weighted-vote: the answer with the largest sum of rewards, not the best single chain and not the most frequent."""

from __future__ import annotations

import pytest

from tests.strategies.worlds import World, search, text_of, told

CHAINS = ("so 1", "is 2", "it 2", "or 3", "oh 3", "ah 3")


@pytest.mark.parametrize(
    ("rewards", "winner"),
    [
        ((0.9, 0.5, 0.6, 0.1, 0.1, 0.1), 2),  # 1.1 for "2", against the best chain and the plain majority
        ((0.9, 0.2, 0.2, 0.2, 0.1, 0.1), 0),
        ((0.9, 0.1, 0.1, 0.3, 0.4, 0.3), 4),
        ((0.5, 0.5, 0.5, 0.5, 0.5, 0.5), 3),  # equal rewards are a plain majority
        ((0.0, 0.0, 0.0, 0.0, 0.0, 0.0), 3),
    ],
)
def test_the_sum_of_rewards_decides(rewards: tuple[float, ...], winner: int) -> None:
    """And the best chain of the winning answer gives the words."""
    world = World({"": CHAINS}, dict(zip(CHAINS, rewards, strict=True)))

    answer, out = search("weighted-vote", world, k=6)

    assert (winner, CHAINS[winner]) == (answer.winner, text_of(world, answer))
    assert {"3": 3, "2": 2, "1": 1} == dict(answer.votes)
    sums = {"1": rewards[0], "2": pytest.approx(sum(rewards[1:3])), "3": pytest.approx(sum(rewards[3:]))}
    assert [sums] == [vote["weights"] for vote in told(out, "vote")]
