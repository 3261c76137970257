"""self-certainty: the surest chain answers, or chains vote by rank."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from pydantic import ValidationError

from thinkserve.strategies.engine import Sampling, Task, TokenStats
from thinkserve.strategies.scripted import ScriptedStats
from thinkserve.strategies.self_certainty import SelfCertaintyOptions, default_power
from thinkserve.strategies.testing import ScriptedEngine, play

pytestmark = pytest.mark.anyio


def sure(*certainties: float) -> ScriptedStats:
    """Chain i is `certainties[i]` certain on average, its tokens alternate around that."""
    swing = 0.25
    return lambda index, at: TokenStats(certainties[index] + (swing if at % 2 else -swing), 1.0, 1.0, -5.0)


def chains(*answers: str) -> list[str]:
    """Scripts of even length that think and answer."""
    return ["tttt</think>" + answer.rjust(4) for answer in answers]


def task_for(engine: ScriptedEngine, **more: object) -> Task:
    """Any question."""
    return Task(engine.encode("q<think>"), 200, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(("power", "winner"), [(1.2, "2"), (2.0, "1"), (0.0, "2"), (1.5, "2"), (1.51, "1")])
async def test_power_decides_between_the_sure_and_the_many(power: float, winner: str) -> None:
    """Ranks A > B > B > C: B wins below about 1.507, A above."""
    engine = ScriptedEngine(chains("1", "2", "2", "3"), stats=sure(4, 3, 2, 1))

    answer, _ = await play("self-certainty", engine, task_for(engine), k=4, power=power)

    assert winner == engine.decode(answer.tokens).strip("t ")
    assert {"1": 1, "2": 2, "3": 1} == dict(answer.votes)
    assert answer.reason.startswith(f"{dict(answer.votes)[winner]} of 4 votes, by weight ")


async def test_the_event_tells_the_weights() -> None:
    """Of every answer, the weightiest first."""
    engine = ScriptedEngine(chains("1", "2", "2", "3"), stats=sure(4, 3, 2, 1))

    _, out = await play("self-certainty", engine, task_for(engine), k=4, power=1.2)
    (weights,) = [event.data["weights"] for event in out.events if event.type == "vote"]

    assert isinstance(weights, dict)
    assert {"2": pytest.approx(6.035, abs=1e-3), "1": pytest.approx(5.278, abs=1e-3), "3": 1.0} == weights
    assert ["2", "1", "3"] == list(weights)


@pytest.mark.parametrize(
    "answers", [("1", "2", "2"), ("1", "1", "2"), ("1", "2", "3"), ("x", "1", "x"), ("x", "y", "z")]
)
async def test_power_0_is_the_majority(answers: Sequence[str]) -> None:
    """The same chain with the same votes, whoever is sure."""
    scripts = ["t" * (5 - at) + "</think>" + answer for at, answer in enumerate(answers)]
    engine, other = ScriptedEngine(scripts, stats=sure(3, 2, 1)), ScriptedEngine(scripts)

    voted, _ = await play("self-certainty", engine, task_for(engine), k=3, power=0.0)
    plain, _ = await play("majority", other, task_for(other), k=3)

    assert (plain.tokens, plain.winner, plain.votes) == (voted.tokens, voted.winner, voted.votes)


async def test_a_chain_without_an_answer_keeps_its_rank_and_casts_no_vote() -> None:
    """The surest says nothing to compare: the others weigh 2 and 1, not 3 and 2."""
    engine = ScriptedEngine(chains("no", "1", "2"), stats=sure(3, 2, 1))

    answer, out = await play("self-certainty", engine, task_for(engine), k=3, power=1.0)
    (weights,) = [event.data["weights"] for event in out.events if event.type == "vote"]

    assert {"1": 2.0, "2": 1.0} == weights
    assert 1 == answer.winner


async def test_of_equal_answers_the_surest_chain_is_returned() -> None:
    """In its own words."""
    engine = ScriptedEngine(chains("1", "=1", "so 1"), stats=sure(1, 3, 2))

    answer, _ = await play("self-certainty", engine, task_for(engine), k=3, power=1.0)

    assert 1 == answer.winner


@pytest.mark.parametrize(("certainties", "winner"), [((1, 3, 2), 1), ((2, 2, 1), 0), ((0, 0, 9), 2)])
async def test_best_of_n_returns_the_surest_whatever_it_says(certainties: Sequence[float], winner: int) -> None:
    """No vote; of equals the first."""
    engine = ScriptedEngine(chains("prose", "other", "more"), stats=sure(*certainties))

    answer, _ = await play("self-certainty", engine, task_for(engine), k=3, select="best-of-n")

    assert (winner, {}) == (answer.winner, dict(answer.votes))
    assert "highest of 3" in answer.reason


async def test_certainty_is_a_mean_not_a_sum() -> None:
    """A long chain of unsure tokens does not beat a short sure one."""
    engine = ScriptedEngine(["t" * 60 + "</think>1", "tt</think>2"], stats=sure(1, 3))

    answer, _ = await play("self-certainty", engine, task_for(engine), k=2, select="best-of-n")

    assert 1 == answer.winner


async def test_only_chains_that_are_compared_ask_for_statistics() -> None:
    """Greedy sampling runs one chain, and that needs none."""
    several, greedy = (ScriptedEngine(chains("1")) for _ in range(2))

    await play("self-certainty", several, task_for(several), k=2)
    await play("self-certainty", greedy, task_for(greedy, sampling=Sampling(temperature=0.0)), k=2)

    assert [True, True] == [stream.job.stats for stream in several.history]
    assert [False] == [stream.job.stats for stream in greedy.history]


def test_the_default_power_follows_the_number_of_chains() -> None:
    """The paper's 0.3 and 1.2, and a line between them."""
    assert [0.3, 0.3, 0.75, 1.2, 1.2] == [pytest.approx(default_power(k)) for k in (1, 16, 24, 32, 64)]


@pytest.mark.parametrize("power", [-0.1, float("nan"), float("inf"), 17.0])
def test_a_power_out_of_range_is_refused(power: float) -> None:
    """Before anything runs."""
    with pytest.raises(ValidationError):
        SelfCertaintyOptions(power=power)


async def test_the_weakest_stretch_decides_where_it_is_asked_for() -> None:
    """The first chain is surer on average, but not for four tokens in a row."""
    weak = [9.0] * 3 + [1.0] * 4 + [9.0] * 20
    engine, other = (
        ScriptedEngine(chains("1", "2"), stats=lambda index, at: TokenStats((weak[at], 5.0)[index], 1.0, 1.0, -5.0))
        for _ in range(2)
    )

    mean, _ = await play("self-certainty", engine, task_for(engine), k=2, select="best-of-n")
    lowest, _ = await play(
        "self-certainty", other, task_for(other), k=2, select="best-of-n", certainty="lowest-window", window=4
    )

    assert (0, 1) == (mean.winner, lowest.winner)
