"""DVTS: subtrees that share nothing."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from tests.strategies.worlds import World, search, text_of, told
from thinkserve.strategies.dvts import DvtsOptions


def test_every_subtree_goes_on_from_its_own_best() -> None:
    """The best of its m steps, though all of another subtree's are better."""
    rewards = {"a\n\n": 0.9, "b\n\n": 0.8, "c\n\n": 0.2, "d\n\n": 0.3}
    world = World({"": tuple(rewards)}, rewards)

    search("dvts", world, n=4, m=2)

    assert {"": 4, "a\n\n": 2, "d\n\n": 2} == dict(world.visits)


def test_the_solutions_of_the_last_expansions_decide() -> None:
    """One subtree ends at once with two answers, the other one step later; a solution that was passed over is out."""
    steps = {"": ("1", "so 1", "2", "e\n\n"), "e\n\n": ("3", "f\n\n")}
    rewards = {"1": 0.5, "so 1": 0.4, "2": 0.3, "e\n\n": 0.6, "e\n\n3": 0.8, "e\n\nf\n\n": 0.7}
    world = World(steps, rewards)

    answer, out = search("dvts", world, n=4, m=2)

    assert {"1": 2, "3": 1} == dict(answer.votes)
    assert {"1": pytest.approx(0.9), "3": 0.8} == told(out, "vote")[0]["weights"]
    assert "1" == text_of(world, answer)


def test_numbers_of_nodes_do_not_depend_on_who_is_faster() -> None:
    """The same tree whatever the pace of its steps."""
    steps = {"": ("a\n\n", "b\n\n"), "a\n\n": ("c\n\n",), "b\n\n": ("d\n\n",)}

    def tree(pace: dict[int, int]) -> dict[object, object]:
        _, out = search("dvts", World(steps, lambda text: 0.5, pace=pace), n=2, m=1)
        return {event["node"]: event["parent"] for event in told(out, "node.created")}

    assert tree({}) == tree({2: 9})
    assert 7 == len(tree({}))


def test_no_two_nodes_have_one_number() -> None:
    """Neither in subtrees nor where a solution is written to its end after them."""
    steps = {"": ("a\n\n", "b\n\n"), "a\n\n": ("c\n\n",), "b\n\n": ("d\n\n",)}
    world = World(lambda text: steps.get(text, ("e\n\n",)), lambda text: 0.5)

    _, out = search("dvts", world, world.task(40), n=2, m=1)

    numbers = [event["node"] for event in told(out, "node.created")]
    assert len(set(numbers)) == len(numbers) > 5


def test_m_divides_n() -> None:
    """Otherwise there is no whole number of subtrees."""
    with pytest.raises(ValidationError, match="divide"):
        DvtsOptions(n=6, m=4)


@pytest.mark.parametrize(("n", "m"), [(1, 1), (2, 2), (6, 3), (7, 1), (8, 4), (10, 2), (12, 4), (64, 4)])
def test_m_left_out_divides_n_too(n: int, m: int) -> None:
    """The largest divisor up to 4; then no more is written at once than admission counted."""
    options = DvtsOptions.model_validate_json(f'{{"n": {n}}}')
    assert (m, n) == (options.m, options.chains())


def test_no_more_is_written_at_once_than_was_counted() -> None:
    """With a number that 4 does not divide: each round writes six steps, all subtrees together."""
    world = World(lambda text: ("a\n\n", "b\n\n") if len(text) < 9 else ("",), lambda text: 0.5)

    search("dvts", world, n=6)

    rounds = [sum(count for text, count in world.visits.items() if len(text) == size) for size in (0, 3, 6)]
    assert [6, 6, 6] == rounds


def test_a_limit_that_strikes_within_a_step_loses_no_solution() -> None:
    """Time is over behind an open step that was rated better than a complete solution: that one answers."""
    rewards = {"it is 1": 0.6, "b\n\n": 0.7}
    world = World({"": tuple(rewards), "b\n\n": ("x" * 99,)}, rewards, deadline=20)

    answer, _ = search("dvts", world, n=2, m=2)

    assert ("it is 1", "stop", "deadline") == (text_of(world, answer), answer.finish, answer.stopped_by)


def test_a_dead_end_is_not_gone_on_from_while_there_is_another_step() -> None:
    """Though it is rated better."""
    steps = {"": ("so 7.", "a\n\n"), "a\n\n": ("b</think>8",)}
    world = World(steps, lambda text: 0.9 if text == "so 7." else 0.2, prompt="q<think>")

    _, out = search("dvts", world, world.task(phase="thinking"), n=2, m=2)

    assert "8" == world.decode(out.tokens_of("answer"))


def test_a_subtree_that_uses_up_its_share_is_told() -> None:
    """Though another one leaves so much of its own that the sum is below the limit."""
    world = World(lambda text: ("b\n\n",) if text else ("1", "b\n\n"), lambda text: 0.5)

    answer, _ = search("dvts", world, world.task(max_total_tokens=100), n=2, m=1)

    assert world.generated < 75
    assert ("1", "budget") == (text_of(world, answer), answer.stopped_by)
    assert "stopped by its limit of tokens" in answer.reason
