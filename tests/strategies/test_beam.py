"""Beam search: slots, what is kept of them, and the plain case."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies.worlds import World, binary, preferring, search, text_of, told
from thinkserve.strategies.errors import EngineFailed


def lettered(text: str) -> tuple[str, ...]:
    """Two letters a step, for ever."""
    return ("a\n\n", "b\n\n")


@given(n=st.integers(1, 6), lengths=st.lists(st.integers(0, 4), min_size=6, max_size=6))
def test_width_one_and_equal_rewards_are_plain_samples(n: int, lengths: list[int]) -> None:
    """n solutions of n chains, each the text that it would have written alone, and no token more."""
    chains = [f"{name}\n\n" * length + f"so {name}" for name, length in zip("uvwxyz", lengths, strict=True)]

    def steps(text: str) -> tuple[str, ...]:
        return tuple(chain[len(text) :] for chain in chains[:n] if chain.startswith(text))

    world, plain = World(steps, lambda text: 0.5), World({"": tuple(chains)})

    answer, out = search("beam", world, n=n, m=1, select="majority")
    search("majority", plain, k=n)

    assert sorted(chains[:n]) == sorted(leaves(world))
    assert n == sum(answer.votes.values()) or n == len(told(out, "vote")[0]["voters"])  # type: ignore[arg-type]
    assert plain.generated == world.generated


def leaves(world: World) -> list[str]:
    """The complete solutions that were written."""
    ends = [stream for stream in world.history if stream.tokens and stream.tokens[-1] == 0]
    return [world.behind(stream.job) + world.decode(stream.tokens) for stream in ends]


def test_of_every_m_steps_the_best_is_kept_and_replicated() -> None:
    """n = 4, m = 2: the two best of four, twice each; the others are pruned."""
    rewards = {"a\n\n": 0.2, "b\n\n": 0.9, "c\n\n": 0.4, "d\n\n": 0.8}
    world = World({"": tuple(rewards)}, rewards)

    _, out = search("beam", world, n=4, m=2)

    assert {"": 4, "b\n\n": 2, "d\n\n": 2} == dict(world.visits)
    assert {1, 3} == {event["node"] for event in told(out, "node.pruned") if event["reason"] == "beam"}


def test_complete_solutions_leave_with_their_slots() -> None:
    """Two of four are complete after the first step: two slots go on."""
    world = World({"": ("1", "2", "a\n\n", "b\n\n"), "a\n\n": ("3", "4")}, {"a\n\n": 0.9, "b\n\n": 0.2})

    answer, out = search("beam", world, n=4, m=2, select="majority")

    assert {"": 4, "a\n\n": 2} == dict(world.visits)
    assert {"1": 1, "2": 1, "3": 1, "4": 1} == dict(answer.votes)
    assert 2 == len(told(out, "node.expanded"))


def test_two_slots_that_write_the_same_are_two() -> None:
    """They are scored once, but both take part in what follows."""
    world = World({"": ("a\n\n", "a\n\n", "b\n\n", "c\n\n")}, {"a\n\n": 0.9, "b\n\n": 0.8, "c\n\n": 0.1})

    search("beam", world, n=4, m=2)

    assert {"": 4, "a\n\n": 4} == dict(world.visits)
    assert 3 == len(world.scored[0][1])


@pytest.mark.parametrize(("select", "answer"), [("weighted", "2"), ("best", "1"), ("majority", "3")])
def test_the_solutions_decide_as_asked(select: str, answer: str) -> None:
    """By sum of rewards, by the best, or by number."""
    chains = ("1", "2", "so 2", "3", "is 3", "or 3")
    rewards = dict(zip(chains, (0.9, 0.6, 0.6, 0.1, 0.1, 0.1), strict=True))
    world = World({"": chains}, rewards)

    result, _ = search("beam", world, n=6, m=2, select=select)

    assert text_of(world, result).endswith(answer)


def test_one_beam_is_greedy_by_reward() -> None:
    """n = m: the best step of each round is gone on with."""
    world = World(binary(5), preferring("RLRLR"))

    answer, out = search("beam", world, n=4, m=4)

    assert "RLRLR" == text_of(world, answer).replace("\n", "")
    assert 6 == len(told(out, "node.expanded"))


def test_a_step_that_is_kept_is_not_told_as_pruned() -> None:
    """Two slots wrote it, and one of them is cut."""
    world = World({"": ("a\n\n", "a\n\n")}, {"a\n\n": 0.9})

    _, out = search("beam", world, n=2, m=2)

    assert {"": 2, "a\n\n": 2} == dict(world.visits)
    assert [] == [event["node"] for event in told(out, "node.pruned") if event["reason"] == "beam"]


def test_slots_of_dead_ends_are_taken_by_others() -> None:
    """Three of four first steps end inside their thinking: the fourth goes on in all four slots."""
    steps = {"": ("so 1.", "so 2.", "so 3.", "a\n\n"), "a\n\n": tuple(f"b</think>{n}" for n in range(4))}
    world = World(steps, prompt="q<think>")

    answer, _ = search("beam", world, world.task(phase="thinking"), n=4, m=2, select="majority")

    assert {"": 4, "a\n\n": 4} == dict(world.visits)
    assert {"0": 1, "1": 1, "2": 1, "3": 1} == dict(answer.votes)


@pytest.mark.parametrize(
    ("name", "options"), [("beam", {"n": 2, "m": 1}), ("rebase", {"width": 2}), ("particle", {"n": 2})]
)
@pytest.mark.parametrize(("passes", "stopped_by"), [(2, "all_done"), (1, "budget")])
def test_a_search_that_is_through_was_not_stopped(
    name: str, options: dict[str, Any], passes: int, stopped_by: str
) -> None:
    """Though its last pass was the last that it might have: all solutions are there."""
    world = World({"": ("1", "2")})

    answer, _ = search(name, world, max_passes=passes, **options)

    assert stopped_by == answer.stopped_by
    assert ("stopped by its limit of passes" in answer.reason) == (stopped_by == "budget")


def test_a_search_whose_slots_have_all_ended_is_through() -> None:
    """One of them in a dead end: nothing is left to propose, whatever its limit says."""
    world = World({"": ("so 1.", "a</think>2")}, prompt="q<think>")

    answer, _ = search("beam", world, world.task(phase="thinking"), max_passes=2, n=2, m=1)

    assert "all_done" == answer.stopped_by


@pytest.mark.parametrize(
    ("name", "options"),
    [("beam", {"n": 2, "m": 1}), ("rebase", {"width": 2}), ("particle", {"n": 2}), ("dvts", {"n": 2, "m": 1})],
)
def test_a_search_that_lost_its_rewards_in_the_last_round_says_so(name: str, options: dict[str, Any]) -> None:
    """All solutions are there, but one was never rated."""
    world = World({"": ("a\n\n", "b\n\n"), "a\n\n": ("1",), "b\n\n": ("2",)}, tired=2, ailment=EngineFailed("away"))

    answer, _ = search(name, world, **options)

    assert ("error", True) == (answer.stopped_by, "the loss of its reward model" in answer.reason)
