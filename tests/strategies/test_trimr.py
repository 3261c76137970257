"""TrimR: thinking ends where results agree or will not come, and the verifier never holds the decoding."""

from __future__ import annotations

import json
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies.trimming import OFF, Watched, endings, task_for, thinking, thought, trim, verdicts
from thinkserve.strategies.engine import Answer, Event, Job, ModelInfo
from thinkserve.strategies.errors import EngineDead, EngineFailed, Unforgiven, Unsupported
from thinkserve.strategies.modifiers import Layer, layered, modifiers
from thinkserve.strategies.registry import get
from thinkserve.strategies.testing import SCRIPTED, Recorder, ScriptedEngine, play
from thinkserve.strategies.trimr import LEAD, TrimrOptions

pytestmark = pytest.mark.anyio


async def test_three_results_that_agree_end_the_thinking_at_the_third() -> None:
    """Mildly: a lead to the conclusion in the place of the next look, and the model closes its thinking itself."""
    engine = Watched(thinking("111") + thought("1", 3)[:57] + "</think>It is 1.")
    _, out, text = await trim(engine, **OFF)

    assert [(1, True, None, 0), (2, True, True, 1), (3, True, True, 2)] == verdicts(out)
    assert [("overthinking", "mild")] == endings(out)
    before, after = text.split(LEAD)
    assert before == thinking("111")
    assert "Wait, this is look number 3 at the whole of it. Now then.</think>It is 1." == after
    assert 5 == len(engine.asked)


@pytest.mark.parametrize(
    ("results", "asked"), [("1212121212", 19), ("11211", 9), ("----------", 10), ("1-1-2-2-", 11), ("1", 1)]
)
async def test_results_that_do_not_agree_three_times_in_a_row_end_nothing(results: str, asked: int) -> None:
    """Also A, A, B, A, A; thoughts without a result are passed over and break no row."""
    script = thinking(results) + "Wait, this is the very end of it.</think>1"
    engine = Watched(script)
    _, out, text = await trim(engine, **OFF)

    assert script == text.removesuffix("<eos>")
    assert [] == endings(out)
    assert asked == len(engine.asked)


async def test_a_thought_without_a_result_breaks_no_row() -> None:
    """1, nothing, 1, nothing, 1: three results that agree."""
    _, out, _ = await trim(Watched(thinking("1-1-1-11111") + "</think>1"), **OFF)
    assert [("overthinking", "mild")] == endings(out)
    assert 5 == len(verdicts(out))


async def test_twenty_thoughts_without_agreement_are_closed_by_force() -> None:
    """With our sentence and the tag: all that is left is to answer."""
    engine = Watched(thinking("-" * 40) + "</think>It is 7.")
    _, out, text = await trim(engine, repetition=False, sentence="Enough.")
    thoughts, answer = text.split("</think>")

    assert [("underthinking", "forced")] == endings(out)
    assert (20, 19) == (thoughts.count("do not know"), len(verdicts(out)))
    assert thoughts.endswith("look number 20 at the whole of it.\n\nEnough.\n")
    assert "It is 7." == answer
    assert "It is 7." == engine.decode(out.tokens_of("answer"))


@pytest.mark.parametrize(("results", "ended"), [("1" * 30, []), ("12" * 15, [("underthinking", "forced")])])
async def test_results_that_agree_are_no_underthinking(results: str, ended: list[tuple[str, str]]) -> None:
    """Where nothing ends what agrees, it goes on; the verifier is asked all the same."""
    engine = Watched(thinking(results) + "</think>1")
    _, out, _ = await trim(engine, overthinking=False, repetition=False)

    assert ended == endings(out)
    assert engine.asked


@pytest.mark.parametrize(("need", "closed"), [("either", True), ("both", False)])
async def test_half_of_the_tokens_or_and_many_thoughts_make_underthinking(need: str, closed: bool) -> None:
    """Of the thinking budget if there is one, else of all tokens; with or without the thoughts."""
    script = thinking("-" * 9) + "</think>7"
    engine = Watched(script)
    size = len(engine.encode(script))
    for task in (task_for(engine, size), task_for(engine, thinking_budget=size)):
        fresh = Watched(script)
        _, out, text = await trim(fresh, task, repetition=False, need=need)
        assert closed == (endings(out) == [("underthinking", "forced")]) == (text.removesuffix("<eos>") != script)
        if closed:
            assert size / 2 <= len(out.tokens_of("thinking")) < 0.7 * size + 80


async def test_a_loop_is_closed_at_once() -> None:
    """The third rule, with a verifier that says nothing."""
    engine = Watched("So: " + "0123456789abcdef" * 30 + "</think>7", lambda _: "No")
    _, out, text = await trim(engine, underthinking=False, sentence="")

    assert [("repetition", "forced")] == endings(out)
    assert "So: " + "0123456789abcdef" * 4 + "\n</think>7" == text


RESULTS = st.text("12-", max_size=12)


@given(results=RESULTS, burst=st.integers(1, 3), budget=st.sampled_from([None, 90, 2000]))
def test_a_verifier_that_always_says_no_changes_nothing(results: str, burst: int, budget: int | None) -> None:
    """Until the limit of underthinking: the same tokens, pieces and end as `single`, from one job."""
    script = thinking(results) + "Wait, that was all of it.</think>7"

    async def go(name: str, **options: Any) -> tuple[Answer, Recorder, ScriptedEngine]:
        engine = Watched(script, lambda _: "No", burst=burst)
        task = task_for(engine, thinking_budget=budget)
        return *await play(name, engine, task, **options), engine

    options = {"budget_share": 1.0, "repetition": False}
    trimmed, out, engine = anyio.run(lambda: go("trimr", **options))
    plain, expected, _ = anyio.run(lambda: go("single"))

    assert (plain.tokens, plain.finish) == (trimmed.tokens, trimmed.finish)
    assert expected.pieces == out.pieces
    assert 1 == sum(stream.job.role == "target" for stream in engine.history)


@given(results=st.text("123-", max_size=25), limit=st.integers(1, 3000), budget=st.sampled_from([None, 0, 50, 700]))
def test_limits_hold_whatever_is_put_in(results: str, limit: int, budget: int | None) -> None:
    """Completion and thinking budget, our words included; thinking ends once, by at most two endings."""
    engine = Watched(thinking(results) + "Wait, all of it.</think>It is 7.")
    task = task_for(engine, limit, thinking_budget=budget)

    answer, out, text = anyio.run(lambda: trim(engine, task, mild_room=30))

    assert len(answer.tokens) <= limit
    assert budget is None or len(out.tokens_of("thinking")) <= budget + 1
    assert len(endings(out)) <= 2
    assert text.count("</think>") <= 1


async def test_a_model_that_goes_on_after_its_conclusion_is_closed() -> None:
    """`mild_room` tokens after the lead, at the end of a sentence."""
    engine = Watched(thinking("1" * 30) + "</think>1")
    _, out, text = await trim(engine, mild_room=60, sentence="Stop.", **OFF)

    assert [("overthinking", "mild"), ("overthinking", "forced")] == endings(out)
    concluded = text.split(LEAD)[1].split("</think>")[0]
    assert 60 <= len(concluded) < 60 + len(thought("1")) + len("\n\nStop.\n")
    assert concluded.endswith("\n\nStop.\n")
    assert 3 == len(verdicts(out))


async def test_each_rule_can_be_switched_off() -> None:
    """With all off nothing is asked and nothing changes."""
    script = thinking("1" * 30) + "0123456789abcdef" * 9 + "</think>1"
    engine = Watched(script)
    _, out, text = await trim(engine, overthinking=False, **OFF)

    assert (script, [], []) == (text.removesuffix("<eos>"), engine.asked, endings(out))


@pytest.mark.parametrize("error", [EngineFailed("lost"), EngineDead("gone"), Unsupported("none here")])
async def test_a_verifier_that_is_down_follows_the_policy(error: Exception) -> None:
    """Go on with the other rules and one warning; or end with its error, over which no race gets."""

    class Down(Watched):
        def generate(self, job: Job) -> Any:
            if job.role == "verifier":
                raise error
            return super().generate(job)

    script = thinking("-" * 30) + "</think>7"
    answer, out, _ = await trim(Down(script), repetition=False)
    failing = Down(script)

    assert [("underthinking", "forced")] == endings(out)
    assert (f"the verifier failed: {error}",) == answer.warnings
    with pytest.raises(Unforgiven, match=str(error)) as caught:
        await trim(failing, on_verifier_error="fail")
    assert error is caught.value.failure
    assert [] == failing.live


async def test_decoding_is_never_held() -> None:
    """A verifier that never answers costs not one step, and is cancelled with the chain."""
    asked = answered = 0

    class Mute(Watched):
        def generate(self, job: Job) -> Any:
            return self.silence() if job.role == "verifier" else super().generate(job)

        @asynccontextmanager
        async def silence(self) -> Any:
            nonlocal asked, answered
            asked += 1
            await anyio.sleep_forever()
            answered += 1
            yield

    script = thinking("11111") + "</think>1"
    plain, mute = Watched(script), Mute(script)
    await play("single", plain, task_for(plain))
    with anyio.fail_after(5):
        _, out, text = await trim(mute, **OFF)

    assert script == text.removesuffix("<eos>")
    assert (plain.steps, 1, 0) == (mute.steps, asked, answered)
    assert [] == verdicts(out)


async def test_a_verdict_after_the_end_of_thinking_is_dropped() -> None:
    """The answer goes on as it was."""
    slow: list[anyio.Event] = []

    class Late(Watched):
        def generate(self, job: Job) -> Any:
            return self.late(job) if job.role == "verifier" else super().generate(job)

        @asynccontextmanager
        async def late(self, job: Job) -> Any:
            while not any(2 in stream.tokens for stream in self.history):
                await anyio.lowlevel.checkpoint()
            slow.append(anyio.Event())
            async with super().generate(job) as stream:
                yield stream

    script = thinking("111") + "Wait, all of it.</think>" + "It is 1. " * 20
    _, out, text = await trim(Late(script), **OFF)

    assert (script, []) == (text.removesuffix("<eos>"), endings(out))
    assert len(slow) <= 1


async def test_what_is_put_in_is_not_looked_at_again() -> None:
    """A lead that looks like a thought and a sentence that loops start no rule."""
    engine = Watched(thinking("111") + thought("1", 3) * 3 + "</think>1")
    lead = "Wait, the answer is 1.\n\nWait, the answer is 2.\n\n"
    _, out, text = await trim(engine, lead=lead, mild_room=20, sentence="x" * 200, underthinking=False)

    assert 1 == text.count("answer is 2")
    assert [("overthinking", "mild"), ("overthinking", "forced")] == endings(out)
    assert 3 == len(verdicts(out))
    assert engine.generated + len(lead) + 2 >= len(out.tokens) - 205


async def test_a_small_model_is_ended_by_force_and_without_a_sentence() -> None:
    """By its context; one that asks for the mild ending gets it."""
    info: ModelInfo = replace(SCRIPTED, context=4096)
    script = thinking("1" * 20) + "</think>1"
    _, out, text = await trim(Watched(script, info=info), **OFF)
    assert [("overthinking", "forced")] == endings(out)
    assert text.split("</think>")[0].endswith(("\n", "\n\n"))

    _, out, text = await trim(Watched(script, info=info), ending="mild", mild_room=30, **OFF)
    assert [("overthinking", "mild"), ("overthinking", "forced")] == endings(out)
    assert LEAD in text


async def test_excerpts_are_the_ends_of_thoughts() -> None:
    """In one line, after the question."""
    engine = Watched(thinking("12") + "Wait, all of it.</think>1")
    await trim(engine, excerpt_paragraphs=1, **OFF)

    assert "Question: 1+1?\nExcerpt: So the answer is 1.\nDoes" in engine.asked[0]
    assert "First excerpt: So the answer is 1.\nSecond excerpt: So the answer is 2.\nDo" in engine.asked[2]


@pytest.mark.parametrize(
    "options",
    [{"ask_exists": "Is it done?"}, {"ask_same": "{first} alone?"}, {"agreements": 0}, {"markers": ["x" * 50]}],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any]) -> None:
    """A question without what it asks about; numbers and words out of bounds."""
    with pytest.raises(ValueError, match="1 validation error"):
        TrimrOptions.model_validate_json(json.dumps(options))


@pytest.mark.parametrize("seed", [5, None])
async def test_chains_of_a_race_are_trimmed_each_by_itself(seed: int | None) -> None:
    """Their verdicts and endings are told by chain; the winner's pieces are its tokens."""
    engine = Watched(thinking("1" * 30) + "</think>1")
    out, task = Recorder(), task_for(engine, seed=seed)
    layer = Layer(modifiers()["trimr"], TrimrOptions(**OFF, mild_room=20))
    top, made = layered(engine, task, out, [layer])
    entry = get("majority")

    answer = await entry.run(task, top, out, entry.options.model_validate({"k": 3}))

    told = [event.chain for event in out.events if event.type == "budget.forced"]
    assert list("001122") == sorted(str(each) for each in told)
    assert [0, 1, 2] * 3 == [event.chain for event in sorted_by_thought(out)]
    assert answer.tokens == out.tokens
    assert ([], {"1": 3}) == (made[0].warnings, dict(answer.votes))


def sorted_by_thought(out: Recorder) -> list[Event]:
    told = [event for event in out.events if event.type == "verifier"]
    return sorted(told, key=lambda event: (str(event.data["thought"]), event.chain or 0))


def cancel_after(count: int) -> tuple[bool, ScriptedEngine]:
    """Cancel after so many turns of the loop; whether it came that far."""
    engine = Watched(thinking("1111") + "</think>1", overrun=1)

    async def go() -> bool:
        with anyio.CancelScope() as scope:

            async def tick() -> None:
                for _ in range(count):
                    await anyio.lowlevel.checkpoint()
                scope.cancel()

            async with anyio.create_task_group() as group:
                group.start_soon(tick)
                await play("trimr", engine, task_for(engine), mild_room=10, **OFF)
                group.cancel_scope.cancel()
        return scope.cancel_called

    return anyio.run(go), engine


def test_cancelled_at_any_moment_nothing_lives_on() -> None:
    """Also while the verifier is asked, and in the middle of a splice."""
    for count in range(0, 5000, 7):
        cancelled, engine = cancel_after(count)
        assert [] == engine.live, count
        if not cancelled:
            break

    assert count > 300
    assert not cancelled


@pytest.mark.parametrize(("results", "ended"), [("AAAA", True), ("ABAB", False)])
async def test_results_are_compared_without_the_verifier_where_that_is_asked_for(results: str, ended: bool) -> None:
    """It is asked for existence only, and what the excerpts end with decides."""
    engine = Watched(f"{thinking(results)}{'x' * 200}</think>done", lambda prompt: "Yes")
    _, out, _ = await trim(engine, compare="results", **OFF)

    assert not any("Second excerpt" in prompt for prompt in engine.asked)
    assert ended == any(event.type == "budget.forced" for event in out.events)


async def test_a_small_models_results_are_compared_unless_said_otherwise() -> None:
    """No verifier of its size can be asked that; a large one is."""
    for context, asked in ((4096, False), (65_536, True)):
        engine = Watched(f"{thinking('AAAA')}{'x' * 200}</think>done", info=replace(SCRIPTED, context=context))
        await trim(engine, task_for(engine, 2000), **OFF)
        assert asked == any("Second excerpt" in prompt for prompt in engine.asked)
