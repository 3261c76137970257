"""Loops: found as soon as they are complete, never in ordinary text; and a thought in one is closed."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from random import Random

import anyio
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from thinkserve.strategies.engine import Task
from thinkserve.strategies.registry import get
from thinkserve.strategies.repetition import GuardOptions, Repetition, RepetitionGuard, detector
from thinkserve.strategies.single import stream_chain
from thinkserve.strategies.testing import SCRIPTED, Recorder, ScriptedEngine
from thinkserve.train.tasks import problems
from thinkserve.train.traces import write_trace

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "q<think>"


def first_hit(tokens: list[int], **numbers: int) -> tuple[int, int] | None:
    """After how many tokens a loop was found, and its block."""
    found = Repetition(**numbers)
    for count, token in enumerate(tokens, 1):
        if block := found.push(token):
            return count, block
    return None


@pytest.mark.parametrize("name", ["README.md", "CHANGELOG.md", "strategies", "server", "tests/strategies"])
def test_ordinary_text_has_no_loops(name: str) -> None:
    """Prose, tables and programs, word by word: nothing comes four times in a row."""
    path = ROOT / name
    files = [path] if path.is_file() else sorted(path.glob("*.py"))
    text = "".join(file.read_text() for file in files)
    ids: dict[str, int] = {}
    words = [ids.setdefault(word, len(ids)) for word in re.findall(r"\w+|\s+|[^\w\s]+", text)]

    assert len(words) > 1000
    assert first_hit(words) is None


blocks = st.lists(st.integers(0, 5), min_size=1, max_size=60)


@given(
    start=st.lists(st.integers(0, 5), max_size=80), block=blocks, repeats=st.integers(2, 6), least=st.integers(1, 20)
)
@example(start=[], block=[0, 0, 1, 1], repeats=3, least=1)
def test_a_loop_is_found_within_its_repeats(start: list[int], block: list[int], repeats: int, least: int) -> None:
    """Whatever came before and however the block repeats within itself: at the latest one block after `repeats`."""
    loop = block * -(-least // len(block))  # a short block counts as the least multiple that is long enough
    hit = first_hit(start + loop * (repeats + 1), block=least, most=300, repeats=repeats)

    assert hit is not None
    count, found = hit
    tail = (start + loop * (repeats + 1))[:count]
    assert tail[-found:] * repeats == tail[-found * repeats :]
    assert found >= least


@given(
    start=st.lists(st.integers(10, 99), max_size=50, unique=True),
    block=st.lists(st.integers(100, 999), min_size=4, max_size=40, unique=True),
    repeats=st.integers(2, 5),
)
def test_a_loop_of_different_tokens_is_found_at_its_last(start: list[int], block: list[int], repeats: int) -> None:
    """With the token that completes the last repeat, not before."""
    tokens = start + block * repeats

    assert (len(tokens), len(block)) == first_hit(tokens, block=4, most=64, repeats=repeats)
    assert first_hit(tokens[:-1], block=4, most=64, repeats=repeats) is None


def test_blocks_have_bounds() -> None:
    """A longer block than `most` is no loop; a single token is one when it fills the least block."""
    assert first_hit(list(range(65)) * 6, block=4, most=64, repeats=4) is None
    assert (64, 16) == first_hit([7] * 100)
    assert first_hit([7] * 63 + [8], block=16) is None


@pytest.mark.parametrize("context", [256, 1024, 4096, 32_768])
def test_thoughts_of_the_embedded_family_have_no_loops(context: int) -> None:
    """They go over results again, but not four times the same: also for the small blocks of a small context."""
    tokenizer, rng = Tokenizer.from_file(str(ROOT / "models" / "arith-small" / "tokenizer.json")), Random(0)
    for problem in problems("hard", 30, seed=1):
        spans, _ = write_trace(problem, "verbose", rng)
        tokens = tokenizer.encode("".join(text for text, _ in spans)).ids
        found = detector(context, None, None, 4)
        assert [] == [at for at, token in enumerate(tokens) if found.push(token)]


@pytest.mark.parametrize(("context", "loop"), [(32768, 64), (8192, 64), (4096, 32), (512, 16)])
def test_a_small_model_has_small_blocks(context: int, loop: int) -> None:
    """Half the context, half the block; never less than four tokens."""
    found = detector(context, None, None, 4)
    assert [loop] == [count for count in range(1, loop + 1) if found.push(7)]


def play_guarded(script: str, task: Task, burst: int = 1, **options: object) -> tuple[str, Recorder, ScriptedEngine]:
    """A single chain over the guard."""
    engine, out = ScriptedEngine([script], burst=burst), Recorder()
    guard = RepetitionGuard(engine, task, out, GuardOptions.model_validate(options))
    answer = anyio.run(stream_chain, task, guard, out)
    assert answer.tokens == out.tokens
    assert [] == engine.live
    return engine.decode(answer.tokens), out, engine


def test_a_chain_in_segments_is_left_alone_once_it_answers() -> None:
    """The tag that ends one segment ends the watch, so that a loop in the next, the answer, is nobody's business."""
    engine, out = ScriptedEngine(["so it is 7.</think>" + "a line of its own\n" * 8]), Recorder()
    task = task_for()
    guard, entry = RepetitionGuard(engine, task, out, GuardOptions()), get("budget-guidance")
    answer = anyio.run(entry.run, task, guard, out, entry.options.model_validate({"budget": 400}))

    assert 1 == answer.tokens.count(SCRIPTED.think_close[0])
    assert engine.decode(answer.tokens).endswith("7." + "a line of its own\n" * 8)


def task_for(max_tokens: int = 500, text: str = PROMPT) -> Task:
    return Task(ScriptedEngine([""]).encode(text), max_tokens)


@pytest.mark.parametrize("burst", [1, 3, 7])
def test_a_thought_that_loops_is_closed_and_answered(burst: int) -> None:
    """At once, with the sentence; the answer follows; what was sampled beyond is dropped."""
    loop = "0123456789abcdef. "
    text, out, engine = play_guarded("Look:" + loop * 20 + "</think>ok 7", task_for(), burst, sentence="Enough.")

    assert "Look:" + loop * 4 + "\n\nEnough.\nok 7" == text
    assert "ok 7" == engine.decode(out.tokens_of("answer"))
    (event,) = [event for event in out.events if event.type == "budget.forced"]
    assert {"rule": "repetition", "ending": "forced", "thinking": 77} == event.data
    assert 0 == event.chain
    assert all(len(piece.tokens) == len(piece.logprobs) for piece in out.pieces)


def test_without_a_loop_nothing_is_changed() -> None:
    """Not a token, not a job."""
    text, out, engine = play_guarded("one two. three four.</think>ok 7", task_for())

    assert ("one two. three four.ok 7", 1) == (text, len(engine.history))
    assert [] == [event for event in out.events if event.type == "budget.forced"]


def test_loops_in_the_answer_are_left_alone() -> None:
    """Whether the answer follows a thought or the task begins with it: there is nothing to close."""
    text, _, _ = play_guarded("t</think>" + "ab" * 100, task_for())
    plain, _, _ = play_guarded("ab" * 100, replace(task_for(text="q<think></think>"), phase="answer"))

    assert "ab" * 100 == text[1:] == plain


@pytest.mark.parametrize("limit", range(60, 90))
def test_the_limit_holds_whatever_is_put_in(limit: int) -> None:
    """Without room for the sentence the tag alone; without room for that the chain runs into its limit."""
    _, out, _ = play_guarded("x" * 300 + "</think>ok", task_for(limit), sentence="Enough.")
    _, tight, _ = play_guarded("x" * 300 + "</think>ok", replace(task_for(), thinking_budget=limit), sentence="Enough.")

    assert len(out.tokens) <= limit
    assert len(tight.tokens_of("thinking")) <= limit + 1


def test_a_model_that_does_not_mark_its_thinking_is_not_watched() -> None:
    """One plain job."""
    engine, out = ScriptedEngine(["ab" * 100], info=replace(SCRIPTED, think_open=(), think_close=())), Recorder()
    task = replace(task_for(text="q"), phase=None)
    anyio.run(stream_chain, task, RepetitionGuard(engine, task, out, GuardOptions()), out)

    assert ("ab" * 100, 1) == (engine.decode(out.tokens), len(engine.history))
