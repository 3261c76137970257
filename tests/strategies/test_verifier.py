"""A verifier's Yes or No: log-odds over first tokens, and prompts that begin alike."""

from __future__ import annotations

import math
from typing import Any

import pytest

from thinkserve.strategies.engine import Job
from thinkserve.strategies.errors import Unsupported
from thinkserve.strategies.testing import ScriptedEngine
from thinkserve.strategies.verifier import ASK_EXISTS, ASK_SAME, Verifier, filled, log_odds

pytestmark = pytest.mark.anyio


def answering(reply: str) -> ScriptedEngine:
    return ScriptedEngine([reply], roles=("target", "verifier"))


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        ([("Yes", -0.1), ("No", -2.1)], 2.0),
        ([(" no", -0.5), ("YES", -1.5), ("\n", -1.0)], -1.0),
        ([("Yes", -1.0), (" yes", -1.0), ("No", -1.0), ("x", -9.0)], math.log(2)),
        ([("Yes.", -0.1), ("Maybe", -5.1)], 5.0),  # No is at most as likely as the least that is listed
        ([("No", -0.2), ("Perhaps", -3.2)], -3.0),
        ([("Yes", 0.0)], 0.0),
        ([("Yesterday", -0.1), ("Nobody", -0.2)], math.nan),
        ([], math.nan),
        ([("No", -math.inf), ("Yes", -1.0)], math.inf),
    ],
)
def test_log_odds_gather_all_ways_to_say_it(listed: list[tuple[str, float]], expected: float) -> None:
    """Case and white space do not matter; other words do not count; neither: not a number."""
    found = log_odds(listed)
    assert math.isnan(found) if math.isnan(expected) else math.isclose(expected, found)


async def test_a_question_costs_one_token_of_the_verifier() -> None:
    """Greedy, with alternatives, on the verifier's chat; Yes and No come out with their sign."""
    yes, no, mute = answering("Yes"), answering("No"), answering("~~")

    odds = [await Verifier(engine, "1+1?").states_result("So 2.") for engine in (yes, no, mute)]

    assert odds[0] > 0 > odds[1]
    assert math.isnan(odds[2])
    (job,) = [stream.job for stream in yes.history]
    assert ("verifier", 1, 20, True) == (job.role, job.max_tokens, job.logprobs, job.sampling.greedy)
    assert "user: " + ASK_EXISTS.format(question="1+1?", excerpt="So 2.") in yes.decode(job.prompt)


async def test_both_questions_begin_with_the_users() -> None:
    """What the prefix cache can keep comes first; the wordings are the ones that the embedded models know."""
    engine = answering("Yes")
    verifier = Verifier(engine, "1+1?")
    await verifier.states_result("So 2.")
    await verifier.same_result("So 2.", "So two.")

    first, second = (engine.decode(stream.job.prompt) for stream in engine.history)
    assert first.startswith("user: Question: 1+1?\n")
    assert second.startswith("user: Question: 1+1?\n")
    assert ASK_SAME.format(question="1+1?", first="So 2.", second="So two.") in second


async def test_wordings_can_be_ones_own() -> None:
    """Whatever the names stand for is put in once: braces in an excerpt are text."""
    engine = answering("Yes")
    await Verifier(engine, "{excerpt}", exists="{excerpt} <- {question} {else}").states_result("{question}")

    (stream,) = engine.history
    assert "{question} <- {excerpt} {else}" in engine.decode(stream.job.prompt)
    assert "a {b} {a}" == filled("{a} {b} {c}", a="a", b="{b}", c="{a}")


async def test_without_a_verifier_there_is_no_verdict() -> None:
    """The engine's own refusal."""
    with pytest.raises(Unsupported, match="verifier"):
        await Verifier(ScriptedEngine([""]), "q").states_result("x")


async def test_an_engine_that_ends_at_once_says_nothing() -> None:
    """A request that has run out gives no alternatives: not a number."""

    class Spent(ScriptedEngine):
        def generate(self, job: Job) -> Any:
            return super().generate(Job(job.prompt, 0, role="verifier"))

    assert math.isnan(await Verifier(Spent(["Yes"], roles=("target", "verifier")), "q").states_result("x"))
