"""A*-decoding on tables: best first, optimal, and in a defined order where rewards say nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tests.strategies.worlds import World, search, text_of, told
from thinkserve.strategies.a_star import CHANGE, AStarOptions, Edge


@dataclass(frozen=True)
class Table:
    """All that can be written, and what each text is worth."""

    steps: Mapping[str, tuple[str, ...]]
    rewards: Mapping[str, float]

    def cost(self, text: str, edge: Edge) -> float:
        """f of the solution or step that `text` is, from the root on."""
        f = h = 0.0
        at = ""
        while at != text:
            at = next(at + step for step in self.steps[at] if text.startswith(at + step))
            now = 1 - self.rewards[at]
            f, h = f + CHANGE[edge](now - h), now
        return f

    @property
    def leaves(self) -> list[str]:
        """All complete solutions."""
        return [text for text in self.rewards if text not in self.steps]


@st.composite
def tables(draw: st.DrawFn) -> Table:
    """Up to three steps deep, three continuations at a place, in which no text is the start of another's."""
    steps: dict[str, tuple[str, ...]] = {}
    rewards: dict[str, float] = {}

    def grow(text: str, depth: int) -> None:
        last = [depth == 3 or (depth > 0 and draw(st.booleans())) for _ in range(draw(st.integers(1, 3)))]
        steps[text] = tuple(name if ends else name + "\n\n" for name, ends in zip("abc", last, strict=False))
        for step in steps[text]:
            rewards[text + step] = draw(st.integers(0, 8)) / 8
            if step.endswith("\n\n"):
                grow(text + step, depth + 1)

    grow("", 0)
    return Table(steps, rewards)


@given(table=tables())
def test_the_first_solution_reached_is_the_best_of_all(table: Table) -> None:
    """Compared with every solution there is: none has a lower f; and f never falls from pop to pop."""
    world = World(table.steps, table.rewards)

    answer, out = search("a-star", world, k=3, max_expansions=200)

    popped = [*dict.fromkeys(world.behind(stream.job) for stream in world.history), text_of(world, answer)]
    costs = [table.cost(text, "consistent") for text in popped]
    assert sorted(costs) == costs
    assert min(table.cost(leaf, "consistent") for leaf in table.leaves) == costs[-1]
    assert len(told(out, "node.expanded")) == len(popped) - 1


@given(table=tables())
def test_f_of_a_solution_is_the_reward_its_path_has_lost(table: Table) -> None:
    """From the root, which has lost nothing; with the other edge cost it is twice that less what was gained."""
    for leaf in table.leaves:
        ends = [at for at in range(1, len(leaf) + 1) if leaf[:at] in table.rewards]
        path = [1.0, *(table.rewards[leaf[:at]] for at in ends)]
        lost = sum(max(0.0, before - after) for before, after in pairwise(path))
        gained = sum(max(0.0, after - before) for before, after in pairwise(path))

        assert pytest.approx(lost) == table.cost(leaf, "consistent")
        assert pytest.approx(2 * lost - gained) == table.cost(leaf, "increase")


@pytest.mark.parametrize(("edge", "best"), [("consistent", "low"), ("increase", "up-down")])
def test_the_edge_cost_decides_between_what_was_lost_and_where_it_ended(edge: str, best: str) -> None:
    """.6 lost at once, or .7 lost in two steps with .4 gained between them."""
    steps = {"": ("u\n\n", "low"), "u\n\n": ("p\n\n",), "u\n\np\n\n": ("up-down",)}
    world = World(steps, {"low": 0.4, "u\n\n": 0.6, "u\n\np\n\n": 1.0, "u\n\np\n\nup-down": 0.7})

    answer, _ = search("a-star", world, k=2, edge=edge)

    assert text_of(world, answer).strip().endswith(best)


def test_a_path_that_is_bad_from_the_start_is_not_free() -> None:
    """Steady at .1 loses nothing on the way, but the first step has lost .9."""
    steps = {"": ("bad\n\n", "good\n\n"), "bad\n\n": ("end",), "good\n\n": ("end",)}
    world = World(steps, {"bad\n\n": 0.1, "bad\n\nend": 0.1, "good\n\n": 0.9, "good\n\nend": 0.8})

    answer, _ = search("a-star", world, k=2)

    assert "good\n\nend" == text_of(world, answer)


def test_of_equal_nodes_the_deeper_comes_first() -> None:
    """With constant rewards the search goes straight down and does not look at a second child."""
    world = World(lambda text: ("end",) if text.count("\n\n") == 5 else ("a\n\n", "b\n\n"), lambda text: 0.6)

    answer, out = search("a-star", world, k=2)

    assert "a\n\n" * 5 + "end" == text_of(world, answer)
    assert 6 == len(told(out, "node.expanded"))


@pytest.mark.parametrize(("ahead", "pops"), [(0.0, ["", "a", "b", "aa", "bb"]), (0.06, ["", "a", "aa", "aaa"])])
def test_what_is_expected_ahead_keeps_the_search_from_going_back(ahead: float, pops: list[str]) -> None:
    """Two paths that both lose .05 a step: by f alone they are searched side by side."""
    rewards = {name * depth: 1 - 0.05 * depth - (0.01 if name == "b" else 0) for name in "ab" for depth in range(1, 4)}

    def steps(text: str) -> tuple[str, ...]:
        name = text[:1]
        return ("a\n\n", "b\n\n") if not name else ("end",) if len(said(text)) == 3 else (f"{name}\n\n",)

    world = World(steps, lambda text: rewards[said(text)])

    search("a-star", world, k=2, ahead=ahead)

    assert pops == list(dict.fromkeys(said(world.behind(stream.job)) for stream in world.history))[: len(pops)]


def said(text: str) -> str:
    return text.replace("\n\n", "").replace("end", "")


@pytest.mark.parametrize(("early", "late"), [(0.98, 0.84), (0.98, 0.90), (0.92, 0.84)])
@pytest.mark.parametrize("limit", [{}, {"max_expansions": 13}])
def test_a_solution_has_nothing_ahead(early: float, late: float, limit: dict[str, Any]) -> None:
    """It is not passed over for a path that is longer and has lost much more, whichever was there first."""
    steps = {"": ("s\n\n", "l\n\n"), "s\n\n": ("end",)} | {"l\n\n" * n: ("l\n\n",) for n in range(1, 10)}
    rewards = {"s": early, "send": late} | {"l" * n: 1 - 0.04 * n for n in range(1, 11)}
    world = World(steps | {"l\n\n" * 10: ("end",)}, lambda text: rewards.get(text.replace("\n\n", ""), 0.4))

    answer, _ = search("a-star", world, k=2, ahead=0.05, **limit)

    assert "s\n\nend" == text_of(world, answer)


@pytest.mark.parametrize(("ahead", "finished"), [(0.0, "b"), (0.1, "aa")])
def test_what_is_finished_at_a_limit_is_what_would_have_come_next(ahead: float, finished: str) -> None:
    """By f alone the shallow one, which has lost least; else the deep one, of which less is missing."""
    rewards = {"a": 0.9, "b": 0.85, "aa": 0.8, "ab": 0.1}
    world = World(lambda text: ("a\n\n", "b\n\n"), lambda text: rewards.get(said(text), 0.0))

    answer, _ = search("a-star", world, k=2, ahead=ahead, max_expansions=2)

    assert said(text_of(world, answer)).startswith(finished)


def test_one_continuation_is_plain_sampling() -> None:
    """k = 1: one chain, whatever it is worth; no token more than `single` needs."""
    script = ("one\n\n", "two\n\n", "three")
    steps = {"".join(script[:at]): (script[at],) for at in range(3)}
    world, plain = World(steps, lambda text: 1 / len(text)), World({"": ("".join(script),)})

    answer, _ = search("a-star", world, k=1)
    expected, _ = search("single", plain)

    assert (expected.tokens, expected.finish, expected.stopped_by) == (answer.tokens, answer.finish, answer.stopped_by)
    assert plain.generated == world.generated


def test_one_continuation_is_cut_where_plain_sampling_is() -> None:
    """At max_tokens, in the middle of a step: there is nothing to go back to."""
    world, plain = (World(lambda text: ("ttt\n\n" * 20,), lambda text: 0.5) for _ in range(2))

    answer, _ = search("a-star", world, world.task(18), k=1)
    expected, _ = search("single", plain, plain.task(18))

    assert (expected.tokens, expected.finish, expected.stopped_by) == (answer.tokens, answer.finish, answer.stopped_by)


@pytest.mark.parametrize("limit", [{"max_expansions": 3}, {"max_passes": 6}])
def test_a_limit_returns_the_best_so_far(limit: dict[str, Any]) -> None:
    """A complete solution that was not good enough to be reached, before an open step that is better."""
    steps = {"": ("poor", "fine\n\n")} | {"fine\n\n" * n: ("fine\n\n", "bad\n\n") for n in range(1, 9)}
    world = World(steps, lambda text: 0.2 if "poor" in text else 0.9 if "bad" not in text else 0.1)

    answer, out = search("a-star", world, k=2, **limit)

    assert "poor" == text_of(world, answer)
    assert f"stopped by its limit of {next(iter(limit)).removeprefix('max_')}" in answer.reason
    assert 3 == len(told(out, "node.expanded"))


def test_without_a_solution_the_best_open_step_is_written_to_the_end() -> None:
    """One more job, without a stop."""
    steps = {"": ("a\n\n", "b\n\n"), "b\n\n": ("rest",)}
    world = World(steps, {"a\n\n": 0.3, "b\n\n": 0.6})

    answer, _ = search("a-star", world, k=2, max_expansions=1)

    assert "b\n\nrest" == text_of(world, answer)
    assert [("\n\n",), ("\n\n",), ()] == [stream.job.stop for stream in world.history]
    assert "no proposal was complete" in answer.reason


def test_the_worst_open_nodes_are_given_up() -> None:
    """No more wait than allowed; what was given up is never expanded."""
    world = World({"": ("a\n\n", "b\n\n", "c\n\n")}, {"a\n\n": 0.5, "b\n\n": 0.9, "c\n\n": 0.4})

    _, out = search("a-star", world, k=3, max_open=2)

    assert [{"node": 3, "reason": "too many open nodes"}] == told(out, "node.pruned")[:1]
    assert 3 not in [expanded["node"] for expanded in told(out, "node.expanded")]


@pytest.mark.parametrize("how", ["min", "prod"])
def test_where_rewards_can_only_fall_f_is_the_heuristic_itself(how: str) -> None:
    """With the least or the product of rewards, recovering does not help and noise does not add up."""
    steps = {"": ("a\n\n", "b\n\n"), "a\n\n": ("end",), "b\n\n": ("end",)}
    world = World(steps, {"a\n\n": 0.5, "a\n\nend": 1.0, "b\n\n": 0.8, "b\n\nend": 0.7})

    answer, _ = search("a-star", world, k=2, aggregate=how)

    assert "b\n\nend" == text_of(world, answer)
    assert f"f = {1 - (0.7 if how == 'min' else 0.56):.3f}" in answer.reason


@pytest.mark.parametrize("bad", [{"k": 0}, {"edge": "none"}, {"aggregate": "sum"}, {"max_open": 0}, {"step_tokens": 0}])
def test_parameters_out_of_range_are_refused(bad: Mapping[str, object]) -> None:
    """Before anything runs."""
    with pytest.raises(ValidationError):
        AStarOptions.model_validate(bad)


def test_a_dead_end_is_not_gone_back_to_at_a_limit() -> None:
    """It was passed over long ago, and what was written since is worth more than what lies before it."""
    steps = {"": ("so 7.", "a\n\n"), "a\n\n": ("b\n\n", "c\n\n"), "a\n\nb\n\n": ("d\n\n",)}
    rewards = {"so 7.": 0.95, "a\n\n": 0.8, "a\n\nb\n\n": 0.8}
    world = World(steps, lambda text: rewards.get(text, 0.3), prompt="q<think>")

    answer, _ = search("a-star", world, world.task(phase="thinking"), k=2, max_expansions=2)

    assert text_of(world, answer).startswith("a\n\nb\n\n")
    assert "stopped by its limit of expansions" in answer.reason
