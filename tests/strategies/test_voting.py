"""Votes as tables, and their independence of order as a property."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinkserve.strategies.voting import Ballot, cluster, vote

pytestmark = pytest.mark.anyio


async def same_number(a: str, b: str) -> bool:
    """Equal as integers."""
    return int(a) == int(b)


@pytest.mark.parametrize(
    ("answers", "winner", "votes"),
    [
        ([(9, "1"), (5, "2"), (7, "2")], 1, {"2": 2, "1": 1}),
        ([(9, "1"), (5, "02"), (7, "2")], 1, {"02": 2, "1": 1}),
        # A tie goes to the answer with the shortest member, not the shortest average.
        ([(9, "1"), (3, "1"), (4, "2"), (4, "2")], 1, {"1": 2, "2": 2}),
        # Equal lengths: the sample index decides.
        ([(4, "2"), (4, "1")], 0, {"2": 1, "1": 1}),
        # No vote without an answer, however many and short they are.
        ([(1, None), (2, None), (9, "1")], 2, {"1": 1}),
        ([(5, None), (2, None), (2, None)], 1, {}),
        ([(5, "1")], 0, {"1": 1}),
    ],
)
async def test_the_largest_group_wins(
    answers: list[tuple[int, str | None]], winner: int, votes: dict[str, int]
) -> None:
    """Most votes; a tie goes to the shortest thinking, then to the sample index."""
    verdict = await vote([Ballot(i, length, answer) for i, (length, answer) in enumerate(answers)], same_number)

    assert winner == verdict.winner.index
    assert list(votes.items()) == list(verdict.votes.items())


async def test_a_vote_needs_a_ballot() -> None:
    """No chain, no verdict."""
    with pytest.raises(ValueError, match="ballot"):
        await vote([], same_number)


BALLOTS = st.lists(
    st.tuples(st.integers(0, 5), st.sampled_from(["1", "01", "2", "3", "003", None])), min_size=1, max_size=9
)


@given(ballots=BALLOTS, data=st.data())
async def test_the_order_of_ballots_does_not_matter(ballots: list[tuple[int, str | None]], data: st.DataObject) -> None:
    """Any permutation has the same groups, votes and winner."""
    numbered = [Ballot(i, length, answer) for i, (length, answer) in enumerate(ballots)]
    shuffled = data.draw(st.permutations(numbered))

    assert await cluster(numbered, same_number) == await cluster(shuffled, same_number)
    assert await vote(numbered, same_number) == await vote(shuffled, same_number)


@pytest.mark.parametrize(
    ("weights", "winner", "weighed"),
    [
        ((1.0, 1.0, 1.0), 1, {"2": 2.0, "1": 1.0}),
        ((2.5, 1.0, 1.0), 0, {"1": 2.5, "2": 2.0}),
        ((2.0, 1.0, 1.0), 1, {"2": 2.0, "1": 2.0}),
        ((0.5, 0.1, 0.3), 0, {"1": 0.5, "2": 0.4}),
        ((0.3, 0.1, 0.3), 2, {"2": 0.4, "1": 0.3}),
    ],
)
async def test_the_weightiest_group_wins(weights: tuple[float, ...], winner: int, weighed: dict[str, float]) -> None:
    """Equal weight goes to the group with more members; within a group the weightiest stands for it."""
    answers = zip((9, 5, 7), ("1", "2", "2"), weights, strict=True)
    ballots = [Ballot(index, length, answer, weight) for index, (length, answer, weight) in enumerate(answers)]

    verdict = await vote(ballots, same_number)

    assert winner == verdict.winner.index
    assert list(weighed) == list(verdict.weights) == list(verdict.votes)
    assert pytest.approx(weighed) == dict(verdict.weights)


@given(ballots=BALLOTS)
async def test_votes_are_counted_once(ballots: list[tuple[int, str | None]]) -> None:
    """As many votes as answers; the winner is the shortest of a group that nobody outnumbers."""
    numbered = [Ballot(i, length, answer) for i, (length, answer) in enumerate(ballots)]

    verdict = await vote(numbered, same_number)

    assert sum(verdict.votes.values()) == sum(ballot.answer is not None for ballot in numbered)
    if verdict.votes:
        assert max(verdict.votes.values()) == verdict.votes[verdict.winner.answer or ""]
