"""budget-guidance: which control and which hard end a job gets, and what happens where the end is forced."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from thinkserve.strategies.budget_guidance import GuidanceOptions
from thinkserve.strategies.controls import Guide
from thinkserve.strategies.engine import Phase, Task
from thinkserve.strategies.errors import BadOptions
from thinkserve.strategies.testing import ScriptedEngine, play

pytestmark = pytest.mark.anyio

LONG = "t" * 100 + "</think>9"


def task(engine: ScriptedEngine, budget: int | None = None, logprobs: int | None = None) -> Task:
    """Any question, thinking."""
    return Task(engine.encode("q<think>"), 300, thinking_budget=budget, logprobs=logprobs)


async def test_the_chain_is_guided_towards_the_budget_and_ended_beyond_it() -> None:
    """The control carries the budget, the job the hard end."""
    engine = ScriptedEngine(["ttt</think>9"])

    answer, _ = await play("budget-guidance", engine, task(engine), budget=40)

    job = engine.history[0].job
    assert ((Guide(40),), 50) == (job.controls, job.thinking_budget)
    assert engine.encode("ttt</think>9<eos>") == answer.tokens


@pytest.mark.parametrize(
    ("own", "requested", "slack", "hard", "guided", "end"),
    [
        (40, None, 0.25, True, 40, 50),
        (40, None, 0.0, True, 40, 40),
        (41, None, 0.25, True, 41, 52),
        (40, None, 0.25, False, 40, None),
        (100, None, 0.1, True, 100, 110),
        (None, 60, 0.25, True, 60, 60),
        (None, 60, 0.25, False, 60, 60),
        (40, 45, 0.25, True, 40, 45),
        (40, 300, 0.25, True, 40, 50),
        (None, 0, 0.25, True, 1, 0),
    ],
)
async def test_the_hard_end_never_lies_beyond_the_requests_own(
    own: int | None, requested: int | None, slack: float, hard: bool, guided: int, end: int | None
) -> None:
    """Budget, slack and switch of the strategy against the thinking budget of the request."""
    engine = ScriptedEngine(["ttt</think>9"])

    await play("budget-guidance", engine, task(engine, requested), budget=own, slack=slack, hard=hard)

    job = engine.history[0].job
    assert ((Guide(guided),), end) == (job.controls, job.thinking_budget)


async def test_where_the_end_is_forced_the_answer_begins_with_the_lead_in() -> None:
    """The engine closes, the strategy leads in, the model goes on; an event tells."""
    engine = ScriptedEngine([LONG])

    answer, out = await play("budget-guidance", engine, task(engine), budget=8, lead_in="So: ")

    assert engine.encode("t" * 10 + "</think>So: 9<eos>") == answer.tokens == out.tokens
    assert engine.encode("So: 9<eos>") == out.tokens_of("answer")
    assert [{"thinking": 10}] == [event.data for event in out.events if event.type == "budget.forced"]


async def test_a_model_that_ends_by_itself_gets_no_lead_in() -> None:
    """And no event of a forced end."""
    engine = ScriptedEngine(["tttt</think>9"])

    answer, out = await play("budget-guidance", engine, task(engine), budget=8, lead_in="So: ")

    assert engine.encode("tttt</think>9<eos>") == answer.tokens
    assert [] == [event for event in out.events if event.type == "budget.forced"]


async def test_without_a_hard_end_thinking_goes_on() -> None:
    """As in the paper."""
    engine = ScriptedEngine([LONG])

    answer, _ = await play("budget-guidance", engine, task(engine), budget=8, hard=False)

    assert engine.encode(LONG + "<eos>") == answer.tokens


async def test_tokens_that_nobody_drew_are_not_counted_and_are_certain() -> None:
    """Usage knows what the engine sampled; log-probabilities stay parallel to the tokens."""
    engine = ScriptedEngine([LONG])

    answer, out = await play("budget-guidance", engine, task(engine, logprobs=0), budget=8, lead_in="So: ")

    assert len(answer.tokens) - len("So: ") == engine.generated
    assert all(len(piece.tokens) == len(piece.logprobs) for piece in out.pieces)


@pytest.mark.parametrize("phase", ["answer", None])
async def test_without_thinking_there_is_one_job(phase: Phase | None) -> None:
    """Nothing to close, nothing to lead in."""
    engine = ScriptedEngine(["yes"])

    answer, _ = await play("budget-guidance", engine, Task(engine.encode("q"), 99, phase=phase), budget=8)

    assert (engine.encode("yes<eos>"), 1) == (answer.tokens, len(engine.history))


async def test_a_limit_while_thinking_is_the_end() -> None:
    """No answer is begun on what is left."""
    engine = ScriptedEngine([LONG])

    answer, _ = await play("budget-guidance", engine, Task(engine.encode("q<think>"), 5), budget=8)

    assert ("length", "length", 5) == (answer.finish, answer.stopped_by, len(answer.tokens))


async def test_a_budget_there_must_be() -> None:
    """Its own or the request's."""
    engine = ScriptedEngine(["ttt</think>9"])

    with pytest.raises(BadOptions) as caught:
        await play("budget-guidance", engine, task(engine))

    assert "budget" == caught.value.param


@pytest.mark.parametrize("wrong", [{"budget": 0}, {"slack": -0.1}, {"budget": 10, "lead_in": "x" * 201}, {"x": 1}])
def test_options_out_of_range_are_refused(wrong: dict[str, object]) -> None:
    """By the model, before anything runs."""
    with pytest.raises(ValidationError):
        GuidanceOptions(**wrong)  # type: ignore[arg-type]
