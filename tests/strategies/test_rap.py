"""RAP: the yes or no question, agreement, bounds and backups by hand."""

from __future__ import annotations

from math import exp, inf, log, sqrt
from typing import Any

import anyio
import pytest

from tests.strategies.worlds import World, search, text_of, told
from thinkserve.server.limits import LimitedEngine
from thinkserve.strategies.engine import Answer, Job
from thinkserve.strategies.errors import EngineFailed
from thinkserve.strategies.rap import Plan, RapOptions, agreement, chance
from thinkserve.strategies.testing import Recorder, play
from thinkserve.strategies.tree import Tree
from thinkserve.strategies.tree_budget import limits
from thinkserve.strategies.tree_node import Node

ROLES = ("target", "verifier")


def node(number: int, text: str, parent: Node | None = None, **more: Any) -> Node:
    """A node of a text."""
    return Node(number, parent, None, steps=(text,), **more)


def plan(**options: Any) -> Plan:
    """A plan that nothing has been added to."""
    world, chosen = World({}, roles=ROLES), RapOptions(**options)
    return Plan(Tree(world.task(), world, Recorder(), limits(world.task(), world, chosen)), chosen)


def test_steps_with_one_result_are_one_action() -> None:
    """By their last number, else by their words; samples that were merged count as many; an end is no step."""
    steps = [
        node(1, "2 + 2 = 4\n\n", count=2),
        node(2, "so it is 4.\n\n"),
        node(3, "no  number\n\n"),
        node(4, "no number\n\n"),
        node(5, "5\n\n", count=2),
        node(6, "4", terminal=True),
    ]

    shares = agreement(steps)

    assert {1: 3 / 8, 3: 2 / 8, 5: 2 / 8, 6: 1 / 8} == {step.id: share for step, share in shares.items()}


def test_no_odds_are_too_large() -> None:
    """A verifier elsewhere may say anything."""
    assert [0.0, 0.0, 0.5, 1.0, 1.0] == [chance(odds) for odds in (-inf, -1000.0, 0.0, 1000.0, inf)]
    assert [pytest.approx(1 / (1 + exp(2))), pytest.approx(1 / (1 + exp(-2)))] == [chance(-2.0), chance(2.0)]


def test_the_upper_confidence_bound_by_hand() -> None:
    """Q is the best mean noted, or the reward before the first visit; unvisited counts as visited once."""
    parent = node(0, "")
    good, fresh = node(1, "a", parent), node(2, "b", parent)
    each = plan(w=1.0)
    each.rewards = {good: 0.2, fresh: 0.5}
    each.noted = {parent: [0.4, 0.6, 0.5], good: [0.4, 0.6, 0.5]}

    assert 0.6 + sqrt(log(3) / 3) < 0.5 + sqrt(log(3))
    assert fresh is each.choose(parent, [good, fresh])
    each.noted[fresh] = [0.1]
    each.noted[parent].append(0.1)
    assert 0.6 + sqrt(log(4) / 3) > 0.1 + sqrt(log(4))
    assert good is each.choose(parent, [good, fresh])


def test_backups_by_hand() -> None:
    """Every node notes the mean reward from itself to the end; the root has none of its own."""
    root = node(0, "")
    first = node(1, "a", root)
    second = node(2, "b", first)
    each = plan()
    each.rewards = {first: 0.2, second: 0.8}

    each.back_up([root, first, second])
    each.back_up([root, first])

    assert {root: [0.5, 0.2], first: [0.5, 0.2], second: [0.8]} == {
        node: [pytest.approx(value) for value in noted] for node, noted in each.noted.items()
    }
    assert pytest.approx(0.5) == each.merit(second)


class Opinionated(World):
    """Its verifier finds every step with a G useful, and no other."""

    def _continuation(self, job: Job, index: int) -> str:
        if job.role == "target":
            return super()._continuation(job, index)
        step = self.decode(job.prompt).partition("Next step:\n")[2].partition("\n")[0]
        return "Y" if "G" in step else "N"


def test_the_verifiers_opinion_leads() -> None:
    """Of two steps the useful one, at every turn; each is asked about once, with question and work so far."""
    turns = {"": ("B\n\n", "G\n\n")} | {text * 1: ("B\n\n", "G\n\n") for text in ("G\n\n", "B\n\n", "G\n\nG\n\n")}
    world = Opinionated(turns, roles=ROLES)
    task = world.task(question="which way?")

    answer, _ = search("rap", world, task, samples=2, iterations=2)

    assert text_of(world, answer).startswith("G\n\nG\n\nG\n\n")
    asked = [world.decode(stream.job.prompt) for stream in world.history if stream.job.role == "verifier"]
    assert "Question: which way?\nWork so far:\n\nNext step:\nB\nIs the next step useful?" in asked[0]
    assert "Work so far:\nG\nNext step:" in asked[2]
    jobs = [stream.job for stream in world.history if stream.job.role == "verifier"]
    assert all((1, 0.0, 20) == (job.max_tokens, job.sampling.temperature, job.logprobs) for job in jobs)


def test_agreement_decides_where_nothing_is_known_of_use() -> None:
    """Three of four samples agree: theirs is the higher reward."""
    world = World({"": ("1", "2", "so 2", "is 2")}, roles=ROLES)

    answer, out = search("rap", world, samples=4, iterations=1)

    assert text_of(world, answer).endswith("2")
    assert [pytest.approx(sqrt(0.5 * share), abs=1e-4) for share in (0.25, 0.75)] == [
        event["reward"] for event in told(out, "node.scored")
    ]
    assert ["same result"] * 2 == [event["reason"] for event in told(out, "node.pruned")]


def test_a_verifier_that_fails_leaves_a_step_undecided() -> None:
    """With a warning, once."""
    fail = {index: (0, EngineFailed("away")) for index in range(2, 40)}
    world = World({"": ("1", "2")}, roles=ROLES, fail=fail)

    answer, _ = search("rap", world, samples=2, iterations=1)

    assert ("a step was not judged: away",) == answer.warnings
    assert "stop" == answer.finish


def test_a_verifier_that_fails_ends_the_request_where_that_is_asked_for() -> None:
    """With its own error."""
    world = World({"": ("1", "2")}, roles=ROLES, fail={index: (0, EngineFailed("away")) for index in range(2, 40)})

    with pytest.raises(EngineFailed, match="away"):
        search("rap", world, samples=2, iterations=1, on_verifier_error="fail")


def test_later_iterations_try_what_the_first_passed_over() -> None:
    """Exploration: a path whose first step looked worse is rolled out as well, and votes."""
    steps = {"": ("1\n\n", "1\n\n", "2\n\n"), "1\n\n": ("so 1",), "2\n\n": ("so 2",)}
    world = World(steps, roles=ROLES)

    answer, out = search("rap", world, samples=3, iterations=3, select="weighted")

    assert {"1": 1, "2": 1} == dict(answer.votes)
    assert 3 == len(told(out, "node.expanded"))


def test_the_plan_of_an_empty_tree_is_nothing() -> None:
    """No iteration may fail for want of a proposal."""
    world = World(lambda text: ("\n\n",), roles=ROLES)
    chosen = RapOptions(samples=1)
    tree = Tree(world.task(), world, Recorder(), limits(world.task(), world, chosen))

    anyio.run(Plan(tree, chosen).iterate)

    assert [tree.root] == tree.nodes


def test_a_dead_end_is_no_action() -> None:
    """However many agree with it: the step that has the same result goes on."""
    steps = {"": ("so 7.", "so 7\n\n"), "so 7\n\n": ("b</think>7",)}
    world = World(steps, roles=ROLES, prompt="q<think>")

    answer, out = search("rap", world, world.task(phase="thinking"), samples=2, iterations=2)

    assert "7" == world.decode(out.tokens_of("answer"))
    assert "no proposal" not in answer.reason


def test_only_what_the_verifier_wrote_is_counted() -> None:
    """A question that comes when the request has ended costs nothing."""
    world = World({"": ("1", "2")}, roles=ROLES)

    async def go() -> Answer:
        with LimitedEngine(world, 4, None) as limited:
            return (await play("rap", limited, world.task(50), samples=2, iterations=1))[0]

    answer = anyio.run(go)

    assert 4 == world.generated
    assert "0 scorer passes, 4 tokens" in answer.reason
