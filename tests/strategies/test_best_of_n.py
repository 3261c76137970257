"""best-of-n: whole chains, each read once by the reward model."""

from __future__ import annotations

from collections.abc import Sequence
from math import nan

import pytest

from tests.strategies.worlds import World, search, text_of, told
from thinkserve.strategies.best_of_n import NOTHING_READ
from thinkserve.strategies.engine import Sampling
from thinkserve.strategies.errors import EngineDead, EngineFailed, TooLong, Unsupported
from thinkserve.strategies.rewards import UNREAD, Aggregate, aggregated, cleaned, solution_steps

CHAINS = ("a\n\nb\n\n1", "c\n\n2", "d\n\ne\n\n2", "f 3")
# By chain: last, least, product and mean of its steps.
REWARDS = {
    "a\n\n": 0.2, "a\n\nb\n\n": 0.9, "a\n\nb\n\n1": 0.95, "c\n\n": 0.6, "c\n\n2": 0.7, "d\n\n": 0.8, "d\n\ne\n\n": 0.8,
    "d\n\ne\n\n2": 0.5, "f 3": 0.65,
}  # fmt: skip


@pytest.mark.parametrize(("aggregate", "winner"), [("last", 0), ("min", 3), ("prod", 3), ("mean", 2)])
def test_the_aggregate_decides_which_chain_is_best(aggregate: str, winner: int) -> None:
    """Four chains, one strong last step, one strong weakest step, one strong on average."""
    world = World({"": CHAINS}, REWARDS)

    answer, _ = search("best-of-n", world, k=4, aggregate=aggregate)

    assert (winner, CHAINS[winner]) == (answer.winner, text_of(world, answer))


def test_all_chains_are_one_batch_and_each_is_read_once() -> None:
    """Cut at the blank lines; told by event and reason."""
    world = World({"": CHAINS}, REWARDS)

    answer, out = search("best-of-n", world, k=4)

    ((_, paths),) = world.scored
    assert ["a\n\n|b\n\n|1", "c\n\n|2", "d\n\n|e\n\n|2", "f 3"] == ["|".join(path.steps) for path in paths]
    assert [0.95, 0.7, 0.5, 0.65] == [event["reward"] for event in told(out, "node.scored")]
    assert "reward 0.950, the highest of 4" == answer.reason


def test_a_failed_reward_is_the_worst() -> None:
    """Not a number does not win, and the answer says so."""
    world = World({"": ("x1", "y2")}, {"x1": nan, "y2": 0.1})

    answer, _ = search("best-of-n", world, k=2)

    assert (1, (UNREAD,)) == (answer.winner, answer.warnings)


@pytest.mark.parametrize("name", ["best-of-n", "weighted-vote"])
def test_chains_that_the_reward_model_cannot_read_vote(name: str) -> None:
    """Longer than its context, say: zeros for all would let the first chain win."""
    world = World({"": CHAINS}, lambda text: nan)

    answer, _ = search(name, world, k=4)

    assert ({"2": 2, "1": 1, "3": 1}, (NOTHING_READ,)) == (dict(answer.votes), answer.warnings)


def test_of_equals_the_first_wins() -> None:
    """Constant rewards."""
    world = World({"": CHAINS}, lambda text: 0.5)

    assert 0 == search("best-of-n", world, k=4)[0].winner


@pytest.mark.parametrize("name", ["best-of-n", "weighted-vote"])
def test_without_time_to_score_the_chains_vote(name: str) -> None:
    """The most frequent answer; the warning says why."""
    world = World({"": CHAINS}, REWARDS, tired=0)

    answer, _ = search(name, world, k=4)

    assert ({"2": 2, "1": 1, "3": 1}, "c\n\n2") == (dict(answer.votes), text_of(world, answer))
    assert any("time was over" in warning for warning in answer.warnings)


@pytest.mark.parametrize("name", ["best-of-n", "weighted-vote"])
@pytest.mark.parametrize("error", [EngineFailed("away"), EngineDead("gone"), TooLong(9, 8), Unsupported("no such")])
def test_chains_whose_reward_model_is_lost_vote(name: str, error: Exception) -> None:
    """Their tokens are not thrown away."""
    world = World({"": CHAINS}, REWARDS, tired=0, ailment=error)

    answer, _ = search(name, world, k=4)

    assert ({"2": 2, "1": 1, "3": 1}, "c\n\n2") == (dict(answer.votes), text_of(world, answer))
    assert (f"the reward model failed: {error}",) == answer.warnings


@pytest.mark.parametrize("name", ["best-of-n", "weighted-vote"])
def test_a_single_chain_needs_no_reward(name: str) -> None:
    """Greedy sampling runs one; it is not scored."""
    world = World({"": CHAINS}, REWARDS)

    answer, _ = search(name, world, world.task(sampling=Sampling(temperature=0.0)), k=4)

    assert ([], CHAINS[0]) == (world.scored, text_of(world, answer))


@pytest.mark.parametrize(
    ("how", "expected"), [("last", 0.8), ("min", 0.5), ("prod", 0.36), ("mean", pytest.approx(2.2 / 3))]
)
def test_aggregates_of_steps(how: Aggregate, expected: float) -> None:
    """Of three rewards; of none it is 0."""
    assert pytest.approx(expected) == aggregated([0.9, 0.5, 0.8], how)
    assert 0.0 == aggregated([], how)


def test_failures_are_cleaned_to_zero() -> None:
    """Whatever is no probability."""
    assert (0.0, 0.0, 0.0, 1.0, 0.0) == cleaned([nan, -0.5, 1.5, 1.0, -0.0])


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("a\n\nb", ["a\n\n", "b"]),
        ("a\n\n\n\n \n\nb", ["a\n\n\n\n \n\n", "b"]),
        ("\n\na\n\nb\n\n", ["\n\na\n\n", "b\n\n"]),
        ("", []),
    ],
)
def test_solutions_are_cut_at_blank_lines(text: str, steps: Sequence[str]) -> None:
    """White space alone is no step; all parts together are the text."""
    assert tuple(steps) == solution_steps(text)
