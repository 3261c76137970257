"""The core of the searches: how steps are written, merged, scored and counted, and what happens at the limits."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, nan
from typing import Any

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies.worlds import REWARDED, SEARCHES, SMALL, World, binary, preferring, search, text_of, told
from thinkserve.strategies.engine import Path, Role, Sampling, Score
from thinkserve.strategies.errors import EngineFailed
from thinkserve.strategies.registry import get
from thinkserve.strategies.testing import Recorder, example
from thinkserve.strategies.tree import Tree
from thinkserve.strategies.tree_budget import Limits, TreeOptions, limits
from thinkserve.strategies.tree_node import Node

pytestmark = pytest.mark.anyio
EVERY = pytest.mark.parametrize("name", SEARCHES)


def tree_of(world: World, max_tokens: int = 200, **more: Any) -> tuple[Tree, Recorder]:
    """A search that has not begun."""
    out, task = Recorder(), world.task(max_tokens)
    bounds = {"tokens": 1000, "reserve": 0, "path": max_tokens, "step": 50, "depth": 40}
    return Tree(task, world, out, Limits(**(bounds | more))), out


def texts(nodes: list[Node]) -> list[str]:
    """What each wrote."""
    return [node.text for node in nodes]


async def test_a_step_ends_at_the_blank_line() -> None:
    """Its tokens and the prompt of its children are what was written."""
    world = World({"": ("one\n\ntwo",), "one\n\n": ("two",)})
    tree, _ = tree_of(world)

    (step,) = await tree.expand({tree.root: 1})
    (end,) = await tree.expand({step: 1})

    assert [("one\n\n", False, True), ("two", True, False)] == [(n.text, n.terminal, n.open) for n in (step, end)]
    assert world.history[1].job.prompt == tree.task.prompt + step.tokens
    assert end.tokens == world.encode("one\n\ntwo<eos>")


async def test_the_step_that_closes_thinking_goes_on_to_the_end() -> None:
    """The answer, blank lines and all, is part of the same node; only its first job stops at a blank line."""
    steps = {"": ("a\n\n",), "a\n\n": ("b</think>\n\n",), "a\n\nb\n\n": ("so\n\n4",)}
    world = World(steps, prompt="q<think>")
    tree = Tree(world.task(phase="thinking"), world, Recorder(), Limits(1000, 0, 200, 50, 40))

    (step,) = await tree.expand({tree.root: 1})
    (end,) = await tree.expand({step: 1})

    assert (True, "b\n\nso\n\n4") == (end.terminal, end.text)
    assert [("\n\n",), ("\n\n",), ()] == [stream.job.stop for stream in world.history]
    assert ("b\n\n", "so\n\n", "4") == end.steps
    assert 4 == len(end.rewards)


async def test_a_step_of_white_space_is_passed_over() -> None:
    """It belongs to the next one; a model that writes nothing else is given up on."""
    world = World({"": ("\n\n",), "\n\n": ("x\n\n",)})
    blank = World(lambda text: ("\n\n",))
    tree, _ = tree_of(world)
    other, _ = tree_of(blank)

    (step,) = await tree.propose({tree.root: 1})

    assert "\n\nx\n\n" == step.text
    assert [] == await other.propose({other.root: 2})
    assert 8 == len(blank.history)


async def test_no_two_jobs_draw_the_same_random_numbers() -> None:
    """Continuations of one step included; and a seed depends on nothing but the place in the tree."""
    world, again = (World({"": ("\n\n",), "\n\n": ("x\n\n", "y\n\n")}) for _ in range(2))
    tree, _ = tree_of(world)
    other, _ = tree_of(again)

    first = await tree.expand({tree.root: 2})
    await tree.expand({first[0]: 2, first[1]: 2})
    mine = await other.expand({other.root: 2})
    await other.expand({mine[1]: 2})

    seeds = [stream.job.seed for stream in world.history]
    assert len(set(seeds)) == len(seeds) == 8
    assert {stream.job.seed for stream in again.history} < set(seeds)


async def test_a_step_cut_by_its_cap_is_scored_and_open() -> None:
    """Its children go on in the middle of it."""
    tree, _ = tree_of(World(lambda text: ("t" * 300,), lambda text: 0.7), step=7)

    (step,) = await tree.expand({tree.root: 1})

    assert ("t" * 7, "length", True, (0.7,)) == (step.text, step.finish, step.open, step.rewards)


async def test_equal_siblings_are_one_node() -> None:
    """Scored once, told as pruned, and remembered as so many proposals."""
    world = World({"": ("same\n\n", "other\n\n", "same\n\n")})
    tree, out = tree_of(world)

    steps = await tree.expand({tree.root: 3})

    assert [("same\n\n", 2), ("other\n\n", 1)] == [(step.text, step.count) for step in steps]
    assert [2] == [len(paths) for _, paths in world.scored]
    assert [{"node": 3, "reason": "duplicate"}] == told(out, "node.pruned")
    assert 3 == len(told(out, "node.created"))


@pytest.mark.parametrize("reward", [nan, -0.1, 1.1, inf])
async def test_a_reward_that_is_none_is_the_worst(reward: float) -> None:
    """Not a number, or no probability."""
    tree, _ = tree_of(World({"": ("a\n\n",)}, lambda text: reward))

    (step,) = await tree.expand({tree.root: 1})

    assert (0.0,) == step.rewards


async def test_one_expansion_is_one_batch_of_what_is_new() -> None:
    """All children of all nodes; the reward model is told how many steps it has seen."""
    world = World({"": ("a\n\n", "b\n\n"), "a\n\n": ("c\n\n", "d")}, lambda text: 0.8)
    tree, _ = tree_of(world)

    steps = await tree.expand({tree.root: 2})
    *_, ended = await tree.expand({steps[0]: 2, steps[1]: 1})

    batches = [[("".join(path.steps), path.known) for path in paths] for _, paths in world.scored]
    assert [[("a\n\n", 0), ("b\n\n", 0)], [("a\n\nc\n\n", 1), ("a\n\nd", 1)]] == batches
    # What ends without another word is as good as it was.
    assert (True, "", (0.8,)) == (ended.terminal, ended.text, ended.rewards)


@EVERY
def test_counters_are_the_sums_over_all_nodes(name: str) -> None:
    """Tokens of every node that was created, scores of every one that was scored: told, counted and spent alike."""
    world = World(binary(3), preferring("LRL"))

    answer, out = search(name, world, **SMALL[name])

    nodes = told(out, "node.created")
    asked = sum(stream.job.role == "verifier" for stream in world.history)
    tokens = sum(int(str(node["tokens"])) for node in nodes)
    assert tokens + asked == world.generated
    assert f"{world.generated} tokens" in answer.reason
    passes = sum(len(paths) for _, paths in world.scored) + asked
    assert f"{passes} scorer passes" in answer.reason
    assert f"{len(told(out, 'node.expanded'))} expansions" in answer.reason


@pytest.mark.parametrize("name", REWARDED)
@pytest.mark.parametrize("good", ["LLLL", "RRRR", "LRRL"])
def test_a_reward_model_that_knows_the_way_is_followed(name: str, good: str) -> None:
    """Every search comes to the one right path of sixteen."""
    world = World(binary(4), preferring(good))

    answer, _ = search(name, world, **SMALL[name])

    assert good == text_of(world, answer).replace("\n", "")
    assert ("stop", "all_done") == (answer.finish, answer.stopped_by)


@EVERY
@given(data=st.data())
def test_no_search_generates_more_than_admission_counted(name: str, data: st.DataObject) -> None:
    """chains() times the tokens of one chain, however many expansions that takes; or the request's own ceiling."""
    tokens, total = data.draw(st.integers(1, 60)), data.draw(st.none() | st.integers(1, 200))
    step = "t" * data.draw(st.integers(1, 9)) + data.draw(st.sampled_from(["", "\n\n"]))
    world = World(lambda text: (step,) if data.draw(st.integers(0, 5)) else ("",), lambda text: len(text) % 7 / 6)
    entry = get(name)
    options = example(entry, **SMALL[name])

    answer, _ = search(name, world, world.task(tokens, max_total_tokens=total), **SMALL[name])

    written = sum(stream.generated for stream in world.history if stream.job.role == "target")
    assert written <= min(options.chains() * tokens, total or 10**9)
    assert len(answer.tokens) <= tokens


@pytest.mark.parametrize("name", REWARDED)
@pytest.mark.parametrize("tired", [0, 1, 3])
def test_when_time_is_over_the_best_so_far_answers(name: str, tired: int) -> None:
    """The reward model says no more: nothing else is begun, and there is an answer that says why."""
    world = World(binary(5), preferring("LLLLL"), tired=tired)

    answer, _ = search(name, world, **SMALL[name])

    assert "deadline" == answer.stopped_by
    assert tired == len(world.scored)
    assert text_of(world, answer).startswith("L" * min(tired, 1))


@pytest.mark.parametrize(
    ("name", "tired"), [(name, tired) for name in REWARDED for tired in (0, 1, 3) if (name, tired) != ("particle", 0)]
)
def test_a_search_that_loses_its_reward_model_writes_the_best_so_far_to_its_end(name: str, tired: int) -> None:
    """Nothing else is scored, what was written is not lost, and warning and reason say what happened.

    (Particles that find none at the start weigh what they have themselves: test_particle.)
    """
    world = World(binary(5), preferring("LLLLL"), tired=tired, ailment=EngineFailed("away"))

    answer, _ = search(name, world, **SMALL[name])

    assert tired == len(world.scored)
    assert ("stop", "the reward model failed: away") == (answer.finish, *answer.warnings)
    assert text_of(world, answer).strip()
    assert "stopped by the loss of its reward model" in answer.reason
    assert tired == 0 or text_of(world, answer).startswith("L")


@pytest.mark.parametrize("name", [*REWARDED, "best-of-n", "weighted-vote"])
def test_who_wants_rewards_or_nothing_gets_the_error_of_the_reward_model(name: str) -> None:
    """on_reward_error: fail."""
    world = World(binary(5), preferring("LLLLL"), tired=0, ailment=EngineFailed("away"))

    with pytest.raises(EngineFailed, match="away"):
        search(name, world, on_reward_error="fail", **SMALL.get(name, {"k": 2}))

    assert [] == world.live


@pytest.mark.parametrize("name", REWARDED)
def test_passes_of_the_scorer_are_limited(name: str) -> None:
    """No more solutions than allowed are scored, and the best so far is written to the end."""
    world = World(binary(6), preferring("LLLLLL"))

    answer, _ = search(name, world, max_passes=6, **SMALL[name])

    assert 6 == sum(len(paths) for _, paths in world.scored)
    assert "stopped by its limit of passes" in answer.reason
    assert "budget" == answer.stopped_by
    assert "stop" == answer.finish


@EVERY
def test_the_last_step_is_written_to_the_end(name: str) -> None:
    """At the depth limit there are no more steps, only complete solutions."""
    world = World(lambda text: ("L\n\nrest" if text.count("L") == 2 else "L\n\n",), lambda text: 0.5)

    answer, out = search(name, world, max_depth=3, **SMALL[name])

    assert "L\n\nL\n\nL\n\nrest" == text_of(world, answer)
    assert 3 == max(int(str(node["depth"])) for node in told(out, "node.created"))


@EVERY
@pytest.mark.parametrize("most", [None, 24])
def test_without_a_complete_proposal_thinking_is_ended_in_time(name: str, most: int | None) -> None:
    """A model that thinks for ever is made to answer: the engine closes its thinking where there is room left."""
    world = World(lambda text: ("t\n\n" * 40 + "</think>4",), prompt="q<think>")

    answer, out = search(name, world, world.task(64, phase="thinking", max_total_tokens=most), **SMALL[name])

    assert "no proposal was complete" in answer.reason
    assert "4" == world.decode(out.tokens_of("answer"))
    assert len(answer.tokens) <= 64


@EVERY
def test_a_failed_proposal_is_a_warning(name: str) -> None:
    """The others go on."""
    world = World(binary(2), preferring("LL"), fail={1: (1, EngineFailed("lost"))})

    answer, out = search(name, world, **SMALL[name])

    assert "stop" == answer.finish
    assert ("a proposal failed: lost",) == answer.warnings
    assert [{"node": 0, "message": "lost"}] == told(out, "error")


@EVERY
def test_greedy_sampling_proposes_once(name: str) -> None:
    """More proposals would be the same; said in a warning."""
    world = World(binary(3), preferring("LLL"))

    answer, _ = search(name, world, world.task(sampling=Sampling(temperature=0.0)), **SMALL[name])

    assert 1 == max(world.visits.values())
    assert any("greedy" in warning for warning in answer.warnings)
    assert "LLL" == text_of(world, answer).replace("\n", "")


@EVERY
def test_constant_rewards_end_as_well(name: str) -> None:
    """A reward model that says nothing leaves an answer that was sampled."""
    world = World(binary(3), lambda text: 1.0)

    answer, _ = search(name, world, **SMALL[name])

    assert ("stop", 3) == (answer.finish, len(text_of(world, answer).replace("\n", "")))


async def test_a_slow_subtree_does_not_hold_up_the_others() -> None:
    """Branches expand and score while another one's step is still being written."""
    world = World(lambda text: ("t\n\n", "u\n\n"), lambda text: 0.5, pace={2: 20})
    tree, _ = tree_of(world)
    left, right = await tree.expand({tree.root: 2})
    done: list[str] = []

    async def grow(name: str, branch: Tree, node: Node) -> None:
        for _ in range(2):
            (node, *_) = await branch.expand({node: 1})
        done.append(name)

    async with anyio.create_task_group() as group:
        for name, branch, node in zip("ab", tree.branches(2), (left, right), strict=True):
            group.start_soon(grow, name, branch, node)

    assert ["b", "a"] == done


def test_limits_follow_from_the_request() -> None:
    """chains() chains of tokens, the ceiling if that is less; of several up to a quarter is kept to end one."""

    class Three(TreeOptions):
        def chains(self) -> int:
            return 3

    world = World({})

    free, capped, short = (limits(world.task(100, max_total_tokens=most), world, Three()) for most in (None, 150, 60))
    single = limits(world.task(100), world, TreeOptions())

    found = [(each.tokens, each.reserve) for each in (free, capped, short, single)]

    assert [(300, 75), (150, 37), (60, 15), (100, 0)] == found


async def test_the_last_tokens_are_spent_as_far_as_they_go() -> None:
    """Three are left for four proposals: three get one each, and then the search is over."""
    world = World(lambda text: ("abc\n\n", "bcd\n\n", "cde\n\n", "def\n\n"))
    tree, _ = tree_of(world, tokens=3)

    steps = await tree.expand({tree.root: 4})

    assert ["a", "b", "c"] == texts(steps)
    assert (3, "tokens") == (tree.spent.tokens, tree.over)
    assert [] == await tree.expand({steps[0]: 4})


@pytest.mark.parametrize(
    ("name", "fails", "options"),
    [("a-star", 2, {"k": 2, "max_expansions": 2}), ("mcts", 6, {"width": 2, "simulations": 2})],
)
def test_a_step_behind_which_nothing_could_be_written_is_not_given_up(
    name: str, fails: int, options: dict[str, Any]
) -> None:
    """It is the best of what is there, though the proposals behind it fail: it is written to the end."""
    failing = dict.fromkeys(range(2, 2 + fails), (0, EngineFailed("lost")))
    steps = {"": ("a\n\n", "b\n\n"), "a\n\n": ("end",), "b\n\n": ("b\n\n",)}
    world = World(steps, lambda text: 0.9 if text.startswith("a") else 0.1, fail=failing)

    answer, _ = search(name, world, **options)

    assert "a\n\nend" == text_of(world, answer)
    assert ("a proposal failed: lost",) == answer.warnings


class Noting(World):
    """Notes how many streams are live when something is scored."""

    async def score(self, question: str, paths: Sequence[Path], role: Role = "reward") -> list[Score]:
        """As the base does."""
        self.live_then.append((len(paths), len(self.live)))
        return await super().score(question, paths, role)

    def __init__(self, *args: Any, **more: Any) -> None:
        self.live_then: list[tuple[int, int]] = []
        super().__init__(*args, **more)


async def test_a_slow_child_holds_back_the_scores_of_its_siblings_only() -> None:
    """The proposals of a node are one batch, scored while those of another node are still being written."""
    world = Noting({"": ("a\n\n", "b\n\n"), "a\n\n": ("c\n\n",), "b\n\n": ("long " * 9 + "\n\n",)})
    tree, _ = tree_of(world)
    first, second = await tree.expand({await tree.start(): 2})

    children = await tree.expand({first: 2, second: 2})

    assert [(2, 0), (1, 2), (1, 0)] == world.live_then
    assert sorted(node.id for node in tree.nodes) == [node.id for node in tree.nodes]
    assert [first, second] == [child.parent for child in children]
    assert all(child.rewards for child in children)
