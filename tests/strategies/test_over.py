"""Modifiers below strategies of every kind: what resumes may lie below those that write a chain in several jobs."""

from __future__ import annotations

from typing import Any

import anyio
import pytest

from thinkserve.strategies import registry
from thinkserve.strategies.engine import Answer, Job, Role, Task, TokenStats
from thinkserve.strategies.modifiers import Layer, layered, misfit, modifiers
from thinkserve.strategies.repetition import GuardOptions, RepetitionGuard
from thinkserve.strategies.streams import whole
from thinkserve.strategies.testing import Recorder, ScriptedEngine, example

PROMPT = "q<think>"
ROLES: tuple[Role, ...] = ("target", "guide", "reward", "verifier")
GUARD = modifiers()["repetition-guard"]
GUARDED = [name for name in registry.names() if misfit(GUARD, registry.get(name)) is None]
IN_PARTS = [name for name in GUARDED if registry.get(name).supports.parts]
SMALL: dict[str, dict[str, Any]] = {
    "mcts": {"width": 2, "simulations": 2},
    "rap": {"samples": 2, "iterations": 2},
    "speculative-thinking": {"n1": 8},
}


def writer(text: str, **more: Any) -> ScriptedEngine:
    """All models write the same text, wherever a job finds itself in it; once thinking is closed, its answer."""
    known = ScriptedEngine([""], roles=ROLES)
    whole, start = (*known.encode(text), 0), len(known.encode(PROMPT))
    answer = whole.index(2) + 1
    begun: dict[int, tuple[int, ...]] = {}

    def script(job: Job, index: int) -> tuple[int, ...]:
        written = job.prompt[start:]
        rest = whole[answer + len(written) - written.index(2) - 1 :] if 2 in written else whole[len(written) :]
        # The segments of a chain go on in one script.
        return begun.setdefault(index, known.encode("Y") if job.role == "verifier" else rest)

    return ScriptedEngine(script, roles=ROLES, rate=lambda steps: 0.5, **more)


def guarded(
    name: str, engine: ScriptedEngine, max_tokens: int = 2000, given: dict[str, Any] = {}, **params: Any
) -> tuple[Answer, Recorder]:
    """A strategy over the guard."""
    entry, out = registry.get(name), Recorder()
    task = Task(engine.encode(PROMPT), max_tokens, question="why?")
    options = GuardOptions.model_validate({"min_block": 4, "max_block": 64, **params})
    top, _ = layered(engine, task, out, [Layer(GUARD, options)])
    answer = anyio.run(entry.run, task, top, out, example(entry, **{**SMALL.get(name, {}), **given}))
    assert [] == engine.live
    assert answer.tokens == out.tokens
    return answer, out


# Loops within a paragraph, of paragraphs, and of paragraphs that call for a guide.
LOOPS = ["0123456789abcdef. ", "So it is 7.\n\n", "one.\n\ntwo.\n\n", "Wait, no.\n\n", "Hold on, check.\n\nYes.\n\n"]


@pytest.mark.parametrize("sentence", ["", "Enough."])
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("name", GUARDED)
def test_a_thought_that_loops_is_closed_and_answered(name: str, loop: str, sentence: str) -> None:
    """Under every strategy that lets it, however many jobs a loop is spread over."""
    engine = writer("Look. " + loop * 60 + "</think>It is 8.")
    answer, out = guarded(name, engine, sentence=sentence)
    text = engine.decode(answer.tokens)

    assert "It is 8." == engine.decode(out.tokens_of("answer"))
    assert "stop" == answer.finish
    assert 3 <= text.count(loop) <= 8
    assert any(event.type == "budget.forced" for event in out.events)


@pytest.mark.parametrize("n1", [1, 5, 30, 90])
@pytest.mark.parametrize("loop", LOOPS)
def test_a_loop_is_closed_in_a_peek_as_well(loop: str, n1: int) -> None:
    """Whether or not there is room in it for a sentence, whose blank lines are no place to stop at."""
    engine = writer("Look. " + loop * 60 + "</think>It is 8.")
    answer, out = guarded("speculative-thinking", engine, given={"n1": n1}, sentence="Enough.\n\nOf it.")

    assert "It is 8." == engine.decode(out.tokens_of("answer"))
    assert 3 <= engine.decode(answer.tokens).count(loop) <= 4 + n1 // len(loop) + 125 // len(loop)


@pytest.mark.parametrize("name", GUARDED)
def test_without_a_loop_nothing_is_changed(name: str) -> None:
    """The same answer as without the guard."""
    text = "First.\n\nThen, wait, more of it.\n\nAnd so on to the end.</think>It is 8."
    answer, out = guarded(name, writer(text))
    engine, plain, entry = writer(text), Recorder(), registry.get(name)
    task = Task(engine.encode(PROMPT), 2000, question="why?")
    alone = anyio.run(entry.run, task, engine, plain, example(entry, **SMALL.get(name, {})))

    assert (alone.tokens, alone.finish) == (answer.tokens, answer.finish)
    assert not any(event.type == "budget.forced" for event in out.events)


@pytest.mark.parametrize("limit", [*range(40, 90, 7), 150, 400])
@pytest.mark.parametrize("name", IN_PARTS)
def test_limits_hold_whatever_is_put_in(name: str, limit: int) -> None:
    """As they do for whole chains."""
    engine = writer("So it is 7.\n\n" * 60 + "</think>It is 8.")
    answer, out = guarded(name, engine, limit, sentence="Enough.")

    assert len(answer.tokens) <= limit
    assert len(out.tokens_of("thinking")) <= limit
    assert all(stream.generated <= limit for stream in engine.history)


@pytest.mark.parametrize("name", GUARDED)
def test_no_two_jobs_draw_the_same_random_numbers(name: str) -> None:
    """What goes on behind words of ours has a seed that no other job has, whatever the strategy makes of its own."""
    engine = writer("Look. " + LOOPS[0] * 60 + "</think>It is\n\n8.")
    _, out = guarded(name, engine, sentence="Enough.")

    seeds = [(stream.job.role, stream.job.seed) for stream in engine.history if stream.job.role != "verifier"]
    assert any(event.type == "budget.forced" for event in out.events)
    assert len(set(seeds)) == len(seeds) > 1


def test_a_chain_whose_end_of_thinking_was_dropped_is_watched_again() -> None:
    """By a strategy, or for the words of a modifier above."""
    engine = ScriptedEngine(
        lambda job, _: "so 7." + ("0123456789abcdef" * 60 + "</think>It is 8." if len(job.prompt) > 2 else "</think>")
    )
    task, out = Task(engine.encode(PROMPT), 2000), Recorder()
    guard = RepetitionGuard(engine, task, out, GuardOptions(sentence="Enough."))

    async def go() -> str:
        async with guard.chain(task.job()) as chain:
            async with chain.segment(2000, engine.info().think_close) as stream:
                await whole(stream)
            chain.drop(1)
            chain.inject(engine.encode("\n\n"))
            async with chain.segment(2000) as stream:
                await whole(stream)
            return engine.decode(chain.tokens)

    assert "so 7.\n\n" + "0123456789abcdef" * 4 + "\n\nEnough.\nIt is 8." == anyio.run(go)


def test_only_what_resumes_lies_below_chains_in_parts() -> None:
    """TrimR counts the thoughts of a whole chain; where nobody has said anything, nothing fits."""
    trimr, search, whole = modifiers()["trimr"], registry.get("a-star"), registry.get("majority")

    assert (None, None, None) == (misfit(GUARD, search), misfit(GUARD, whole), misfit(trimr, whole))
    assert "'trimr' follows whole chains; strategy 'a-star'" in str(misfit(trimr, search))
    assert "'particle' takes no modifiers" in str(misfit(GUARD, registry.get("particle")))


def test_the_certainty_of_a_chain_is_that_of_the_tokens_it_drew() -> None:
    """Words of ours are neither sure nor unsure."""
    values = {0: 1.5, 1: 2.5, 2: 0.5}
    engine = ScriptedEngine(
        ["0123456789abcdef" * 20 + "</think>It is 8.", "t</think>It is 8.", "u</think>It is 8."],
        stats=lambda index, _: TokenStats(values[index], 1.0, 1.0, -5.0),
    )
    answer, out = guarded("self-certainty", engine, given={"k": 3, "select": "best-of-n"}, sentence="Enough.")

    (told,) = [event.data["certainty"] for event in out.events if event.type == "vote"]
    assert values == told
    assert 1 == answer.winner
    assert 1 == sum(event.type == "budget.forced" for event in out.events)


def test_words_of_ours_do_not_brake() -> None:
    """Though they end a sentence, and the model's own next step may."""
    lowest = TokenStats(1.0, 1.0, 1.0, 0.0)
    script = "0123456789abcdef" * 20 + "</think>It is 8."
    engine = ScriptedEngine([script], stats=lambda _, place: lowest)
    answer, out = guarded("think-brake", engine, sentence="Enough. Of it. ")

    assert "It is 8." == engine.decode(out.tokens_of("answer"))
    assert ["repetition"] == [event.data.get("rule") for event in out.events if event.type == "budget.forced"]
    assert "" == answer.reason
