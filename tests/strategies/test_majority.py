"""majority@k: everybody votes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from thinkserve.strategies.engine import Sampling, Task
from thinkserve.strategies.errors import EngineFailed
from thinkserve.strategies.testing import SCRIPTED, ScriptedEngine, play

pytestmark = pytest.mark.anyio


def chain(thinking: int, answer: str) -> str:
    """A script that thinks for so many tokens."""
    return "t" * thinking + "</think>" + answer


def task_for(engine: ScriptedEngine, max_tokens: int = 200) -> Task:
    """Any question."""
    return Task(engine.encode("q<think>"), max_tokens)


@pytest.mark.parametrize(
    ("scripts", "winner", "votes"),
    [
        ([chain(9, r"\boxed{1}"), chain(5, r"\boxed{2}"), chain(7, "so 2")], 1, {"2": 2, "1": 1}),
        ([chain(9, "1"), chain(3, "1"), chain(4, "2"), chain(4, "2")], 1, {"1": 2, "2": 2}),
        ([chain(1, "dunno"), chain(2, "dunno"), chain(9, "1")], 2, {"1": 1}),
        ([chain(3, "dunno"), chain(2, "no idea")], 1, {}),
        ([chain(9, r"\boxed{\frac{1}{2}}"), chain(8, "0.5"), chain(7, "2")], 1, {"0.5": 2, "2": 1}),
        # Equal answers although one chain did not close its thinking: it has no answer, whatever it wrote.
        (["t 2 t", chain(9, "1")], 1, {"1": 1}),
    ],
)
async def test_the_most_frequent_answer_wins_in_its_shortest_chain(
    scripts: list[str], winner: int, votes: dict[str, int]
) -> None:
    """Votes, ties and unextractable answers, end to end."""
    engine = ScriptedEngine(scripts)

    answer, out = await play("majority", engine, task_for(engine), k=len(scripts))

    assert (winner, votes, "all_done") == (answer.winner, dict(answer.votes), answer.stopped_by)
    assert engine.encode(scripts[winner] + "<eos>") == answer.tokens == out.tokens


async def test_all_chains_run_to_their_ends() -> None:
    """Nobody is aborted; every token of every chain was generated."""
    scripts = [chain(9, "1"), chain(5, "1"), chain(7, "1")]
    engine = ScriptedEngine(scripts)

    await play("majority", engine, task_for(engine), k=3)

    assert sum(len(engine.encode(script)) + 1 for script in scripts) == engine.generated
    assert [False] * 3 == [stream.aborted for stream in engine.history]


async def test_chains_have_seeds_of_their_own() -> None:
    """Derived from the request's seed and the index."""
    engine = ScriptedEngine(["</think>1"])

    await play("majority", engine, task_for(engine), k=3)

    assert [task_for(engine).job(i).seed for i in range(3)] == [stream.job.seed for stream in engine.history]


async def test_greedy_sampling_runs_one_chain() -> None:
    """k equal chains would be a waste; the answer says so."""
    engine = ScriptedEngine([chain(3, "1")])

    answer, _ = await play("majority", engine, Task(engine.encode("q<think>"), 99, Sampling(temperature=0)), k=5)

    assert 1 == len(engine.history)
    assert any("greedy" in warning for warning in answer.warnings)


async def test_a_failed_chain_is_a_warning() -> None:
    """The others vote."""
    engine = ScriptedEngine([chain(3, "1"), chain(4, "2")], fail={0: (2, EngineFailed("out of memory"))})

    answer, out = await play("majority", engine, task_for(engine), k=2)

    assert (1, ("chain 0 failed: out of memory",)) == (answer.winner, answer.warnings)
    assert "error" in [event.type for event in out.events]


async def test_without_tags_the_whole_text_is_the_answer() -> None:
    """A model that does not mark its thinking."""
    engine = ScriptedEngine(["long way to 1", "1", "2"], info=replace(SCRIPTED, think_open=(), think_close=()))

    answer, out = await play("majority", engine, Task(engine.encode("q"), 99), k=3)

    assert (1, {"1": 2, "2": 1}) == (answer.winner, dict(answer.votes))
    assert {"answer"} == {piece.phase for piece in out.pieces}


async def test_answers_cut_short_are_used_if_there_is_nothing_better() -> None:
    """Text without tags that ran out of tokens still holds a vote."""
    engine = ScriptedEngine(["1 1 1 1 1 1", "1 1 1 1 1 1", "2 2 2 2 2 2"])

    answer, _ = await play("majority", engine, Task(engine.encode("q"), 7, phase="answer"), k=3)

    assert (0, {"1": 2, "2": 1}, "length", "length") == (
        answer.winner,
        dict(answer.votes),
        answer.finish,
        answer.stopped_by,
    )


async def test_progress_is_told_now_and_then() -> None:
    """Every chain starts and finishes in the events; progress comes every 32 tokens; vote and winner close."""
    engine = ScriptedEngine([chain(70, "1"), chain(3, "1")])

    _, out = await play("majority", engine, task_for(engine), k=2)
    told = [(event.type, event.chain) for event in out.events]

    assert 2 == told.count(("chain.progress", 0))
    assert 0 == told.count(("chain.progress", 1))
    assert [("vote", None), ("winner", 1)] == told[-2:]
    assert {("chain.started", 0), ("chain.started", 1), ("chain.finished", 0), ("chain.finished", 1)} <= set(told)


@pytest.mark.parametrize(("max_tokens", "ceiling", "stopped_by"), [(200, 28, "budget"), (19, None, "all_done")])
async def test_an_answer_that_was_cut_does_not_vote_against_a_complete_one(
    max_tokens: int, ceiling: int | None, stopped_by: str
) -> None:
    """Halfway to 12 it reads 1, and its shorter thinking would win the tie."""
    engine = ScriptedEngine([chain(3, "the result is 12"), chain(5, "12")], ceiling=ceiling)

    answer, out = await play("majority", engine, task_for(engine, max_tokens), k=2)

    assert "the result is 1" == engine.decode(engine.history[0].tokens)[3:]
    assert (1, {"12": 1}, "stop", stopped_by) == (answer.winner, dict(answer.votes), answer.finish, answer.stopped_by)
    assert [[1]] == [event.data["voters"] for event in out.events if event.type == "vote"]
