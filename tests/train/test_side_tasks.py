"""Side tasks: every reply is right by an independent reading, and only what the model is to say carries loss."""

from __future__ import annotations

import random
import re
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from thinkserve.train.data import spans_of
from thinkserve.train.evaluate import counted
from thinkserve.train.side_tasks import (
    BRIEF,
    DETAILED,
    Document,
    boxed,
    continued,
    direct,
    exists,
    forced,
    judge,
    same,
    solve,
    summary,
)
from thinkserve.train.tasks import KINDS, OPERATIONS, Kind, Problem, generate
from thinkserve.train.traces import OPENINGS

kinds = st.sampled_from(KINDS)
seeds = st.integers(0, 2**32)
STATED = re.compile(r"(?:answer is(?: still)?|Answer:) (-?\w+)")


def fresh(kind: Kind, seed: int) -> tuple[Problem, random.Random]:
    rng = random.Random(seed)
    return generate(kind, "medium", rng), rng


def learned(document: Document) -> str:
    return "".join(text for text, learn in spans_of(document) if learn)


def whole(document: Document) -> str:
    return "".join(text for text, _ in spans_of(document))


@given(kinds, seeds)
def test_an_excerpt_that_states_a_result_gets_yes(kind: Kind, seed: int) -> None:
    """Yes, and which, exactly where the excerpt says what the answer is."""
    document = exists(*fresh(kind, seed))
    excerpt = document.user.split("Excerpt: ")[1].split("\nDoes this")[0]
    stated = STATED.search(excerpt)
    assert (f"Yes, {stated[1]}." if stated else "No.") == document.answer


@given(kinds, seeds)
def test_two_excerpts_are_the_same_if_their_results_are(kind: Kind, seed: int) -> None:
    """Yes exactly where both stated results are equal; the reply names them."""
    document = same(*fresh(kind, seed))
    first, second = STATED.findall(document.user)
    assert (f"Yes, both {first}." if first == second else f"No, {first} and {second}.") == document.answer


def test_both_replies_are_common() -> None:
    """Neither verification task can be solved by always giving the same reply."""
    for make in (exists, same):
        replies = Counter(counted(make(*fresh(KINDS[seed % 3], seed)).answer) for seed in range(400))
        assert set(replies) == {"Yes", "No"}
        assert min(replies.values()) > 100


@given(kinds, seeds)
def test_verification_and_direct_answers_come_after_a_closed_thought(kind: Kind, seed: int) -> None:
    """Their prompt ends with an empty think block, and the reply alone is learned."""
    for make in (exists, same, direct, judge):
        document = make(*fresh(kind, seed))
        assert f"{document.answer}<|im_end|>" == learned(document)
        assert "<think>\n\n</think>\n\n" + document.answer in whole(document)


@given(kinds, seeds)
def test_a_direct_answer_is_the_right_one(kind: Kind, seed: int) -> None:
    """No thinking, the exact answer; or what somebody had at the start."""
    problem, rng = fresh(kind, seed)
    document = direct(problem, rng)
    if document.user == problem.question:
        assert boxed(problem.answer) == document.answer
        return
    begin, _, person = document.user.removesuffix(" have?").partition(". What does ")
    assert problem.question.startswith(begin)
    assert boxed(dict(entry.split() for entry in problem.start)[person]) == document.answer


@given(kinds, seeds)
def test_what_another_model_began_carries_no_loss(kind: Kind, seed: int) -> None:
    """In a continued thought the beginning is masked and the rest, answer included, is learned."""
    problem, rng = fresh(kind, seed)
    document = continued(problem, rng)
    assert document.thinking is not None
    assert not document.thinking[0][1]
    assert document.thinking[-1][1]
    stated = STATED.findall("".join(text for text, _ in document.thinking))[-1]
    assert boxed(stated) == document.answer
    assert learned(document).endswith(f"{document.answer}<|im_end|>")


@given(kinds, seeds)
def test_a_forced_end_teaches_the_answer_alone(kind: Kind, seed: int) -> None:
    """Neither the cut thought nor the forced closing tag is learned; the right answer is."""
    problem, rng = fresh(kind, seed)
    document = forced(problem, rng)
    assert f"\n\n{boxed(problem.answer)}<|im_end|>" == learned(document)
    assert "</think>" in whole(document)


@given(kinds, seeds)
def test_a_solution_is_in_the_style_that_the_prompt_asks_for(kind: Kind, seed: int) -> None:
    """Who asks for brevity (as user or system) gets symbols; who asks for detail gets sentences."""
    document = solve(*fresh(kind, seed))
    asked = f"{document.system or ''} {document.user}"
    assert document.thinking is not None
    text = "".join(text for text, _ in document.thinking)
    brief, detailed = (any(words in asked for words in wordings) for wordings in (BRIEF, DETAILED))
    sentences = text.startswith(OPENINGS)
    assert not (brief and (detailed or sentences))
    assert sentences or not detailed


def test_about_a_third_of_the_solutions_is_concise_most_of_them_on_request() -> None:
    """The concise mode has 30% of the solutions, and 70% of these were asked for it."""
    concise = asked = 0
    for seed in range(600):
        document = solve(*fresh(KINDS[seed % 3], seed))
        symbols = not "".join(text for text, _ in document.thinking or ()).startswith(OPENINGS)
        concise += symbols
        asked += symbols and any(words in f"{document.system or ''} {document.user}" for words in BRIEF)
    assert 0.24 < concise / 600 < 0.36
    assert 0.6 < asked / concise < 0.8


@given(kinds, seeds)
def test_a_summary_counts_the_steps_that_are_done(kind: Kind, seed: int) -> None:
    """Both forms, writing a summary and continuing from one, speak of as many steps as the problem has."""
    problem, rng = fresh(kind, seed)
    document = summary(problem, rng)
    found = re.search(r"Progress: (\d+) of (\d+) steps are done", document.user + document.answer)
    assert found
    done, total = int(found[1]), int(found[2])
    assert len(problem.steps) == total
    assert 1 <= done < total
    if "Summarise" in document.user:
        work = document.user.split("Work so far:\n")[1].split("\nSummarise")[0]
        assert done == len(work.split("\n\n"))
        assert problem.question.rstrip() in document.user


@given(st.sampled_from(("chain", "expression")), seeds)
def test_a_judge_finds_exactly_the_wrong_steps(kind: Kind, seed: int) -> None:
    """A verdict per step by its own equation, and one in the end."""
    document = judge(*fresh(kind, seed))
    shown = re.findall(r"^Step \d+: (-?\d+)([+*-])(-?\d+)=(-?\d+)$", document.user, re.MULTILINE)
    *verdicts, last = document.answer.split("\n\n")
    assert len(shown) == len(verdicts)
    right = [OPERATIONS[symbol](int(a), int(b)) == int(result) for a, symbol, b, result in shown]
    for n, (truth, verdict) in enumerate(zip(right, verdicts, strict=True), 1):
        assert verdict.startswith(f"Step {n}: {'correct' if truth else 'wrong'}")
    assert f"Verdict: {'correct' if all(right) else 'wrong'}." == last
