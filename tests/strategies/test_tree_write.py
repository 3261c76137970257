"""Proposals that end inside their thinking: no solutions, and nothing is written behind them."""

from __future__ import annotations

from dataclasses import replace

import anyio
import pytest

from tests.strategies.worlds import PROMPT, SEARCHES, SMALL, World, search
from thinkserve.server.answer_stops import AnswerStops
from thinkserve.strategies.engine import Answer, Job, Phase
from thinkserve.strategies.testing import SCRIPTED, Recorder, play
from thinkserve.strategies.tree import Tree
from thinkserve.strategies.tree_budget import Limits, answer_room

EVERY = pytest.mark.parametrize("name", SEARCHES)


@pytest.mark.anyio
@pytest.mark.parametrize(("end", "text"), [("so 7.", ["so 7."]), ("\n\nso 7.", ["\n\nso 7."]), (" ", []), ("", [])])
async def test_what_ends_inside_its_thinking_is_a_dead_end(end: str, text: list[str]) -> None:
    """It has no answer, so it is no solution; and nothing is written behind the end of a sequence."""
    world = World(lambda before: (end[len(before) :],), prompt="q<think>")
    tree = Tree(world.task(phase="thinking"), world, Recorder(), Limits(1000, 0, 200, 50, 40))

    steps = await tree.expand({tree.root: 1})

    assert [(each, False, False) for each in text] == [(step.text, step.terminal, step.open) for step in steps]
    assert 1 + end.startswith("\n\n") == len(world.history)


@EVERY
def test_a_solution_that_ends_inside_its_thinking_does_not_answer(name: str) -> None:
    """However it is rewarded, while there is another."""
    steps = {"": ("a\n\n",), "a\n\n": ("so 7.", "b</think>8")}
    world = World(steps, lambda text: 0.9 if "so 7" in text else 0.2, prompt="q<think>")

    answer, out = search(name, world, world.task(phase="thinking"), **SMALL[name])

    assert ("8", "stop") == (world.decode(out.tokens_of("answer")), answer.finish)


class Hasty(World):
    """Ends inside its thinking, but answers where it is to write to the end."""

    def _continuation(self, job: Job, index: int) -> str:
        steps = super()._continuation(job, index)
        return "</think>8" if job.role == "target" and not job.stop else steps


@EVERY
def test_where_all_end_inside_their_thinking_an_answer_is_written_behind_the_last_step(name: str) -> None:
    """In one go, thinking ended in time."""
    world = Hasty(lambda text: ("so 7.",) if text else ("a\n\n",), prompt="q<think>")

    answer, out = search(name, world, world.task(phase="thinking"), **SMALL[name])

    assert "a\n\n" == world.decode(out.tokens_of("thinking"))
    assert ("8", "stop") == (world.decode(out.tokens_of("answer")), answer.finish)


def test_an_answer_gets_a_quarter_of_what_is_left_or_what_a_short_one_takes() -> None:
    """But never more than there is."""
    assert [0, 20, 32, 100, 1024] == [answer_room(left) for left in (0, 20, 100, 400, 8000)]


@EVERY
@pytest.mark.parametrize(("stop", "text"), [(("\n\n",), "one 1\n\n"), (("2\n\n", "nowhere"), "one 1\n\ntwo 2\n\n")])
@pytest.mark.parametrize("thinks", [False, True])
def test_a_stop_string_that_ends_in_a_blank_line_ends_the_solution(
    name: str, stop: tuple[str, ...], text: str, thinks: bool
) -> None:
    """It is the caller's, not the end of a step; the same in a thought is none."""
    start, close = ("t 2\n\n", "t</think>") if thinks else ("", "")
    first, second = start + "t" * thinks + "one 1\n\n", "two 2\n\n"
    # The later entry counts where both are the empty text.
    steps = {"": (start,), start: (close + "one 1\n\n",), first: (second,), first + second: ("three",)}
    world = World(steps, prompt="q<think>" if thinks else PROMPT)
    task = world.task(phase="thinking" if thinks else "answer", stop=stop)

    async def go() -> tuple[Answer, Recorder]:
        return await play(name, AnswerStops(world, task), task, **SMALL[name])

    answer, out = anyio.run(go)

    assert (text, "stop") == (world.decode(out.tokens_of("answer")), answer.finish)


@EVERY
def test_thinking_that_the_model_opens_itself_is_ended_in_time_as_well(name: str) -> None:
    """Where nothing is written yet, nobody knows whether it will think."""
    world = World(lambda text: ("<think>" + "t" * 60 + "</think>4",), prompt="q")

    answer, out = search(name, world, world.task(40, phase=None, max_total_tokens=60), step_tokens=32, **SMALL[name])

    assert "no proposal was complete" in answer.reason
    assert "4" == world.decode(out.tokens_of("answer"))


@EVERY
def test_the_thinking_of_a_model_that_does_not_reason_has_no_budget(name: str) -> None:
    """An engine refuses one for it."""
    plain = replace(SCRIPTED, think_open=(), think_close=())
    world = World(lambda text: ("t" * 60,), prompt="q", info=plain)

    search(name, world, world.task(40, phase=None, max_total_tokens=60), step_tokens=32, **SMALL[name])

    assert {None} == {stream.job.thinking_budget for stream in world.history}


@pytest.mark.parametrize("name", [*SEARCHES, "single", "majority"])
@pytest.mark.parametrize(("phase", "since"), [(None, 4), ("answer", 0)])
def test_jobs_know_from_where_on_tags_are_the_models_own(name: str, phase: Phase | None, since: int) -> None:
    """What the user has quoted is not; where a template has opened or closed thinking, all count."""
    world = World({"": ("a\n\n",)}, prompt="q<think>so")

    search(name, world, world.task(phase=phase), **SMALL.get(name, {}))

    assert {since} == {stream.job.since for stream in world.history if stream.job.role == "target"}


@pytest.mark.anyio
async def test_a_proposal_that_is_cut_away_was_never_made() -> None:
    """Where passes run short; who goes on from there later goes on with the node's chain."""
    out = Recorder()
    world = World({"": ("a\n\n", "b\n\n"), "a\n\n": ("x\n\n",), "b\n\n": ("y",)})
    tree = Tree(world.task(200), world, out, Limits(1000, 0, 200, 50, 40, passes=3))

    first, second = await tree.expand({tree.root: 2})
    (behind,) = await tree.expand({first: 1, second: 1})
    end = await tree.finish(second)

    assert tree.curtailed
    assert ("x\n\n", "y") == (behind.text, end.text)
    assert [0, second.id] * 2 == [event.chain for event in out.events if event.type == "node.created"]
