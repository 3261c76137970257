"""Traces: what is learned is true, slips carry no loss, and trouble makes a chain longer."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from statistics import mean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinkserve.train.tasks import KINDS, OPERATIONS, Kind, Problem, generate
from thinkserve.train.traces import AGAIN, BRISK, CAREFUL, Habits, Span, Style, write_trace

EQUATION = re.compile(r"(-?\d+)([+*-])(-?\d+)=(-?\d+)")
SLIPPERY = Habits(slip=0.4, again_slip=0.3)
kinds = st.sampled_from(KINDS)
styles = st.sampled_from(("verbose", "concise"))
seeds = st.integers(0, 2**32)


def text_of(spans: list[Span]) -> str:
    return "".join(text for text, _ in spans)


def learned_characters(spans: list[Span]) -> list[bool]:
    return [learn for text, learn in spans for _ in text]


def trace(kind: Kind, style: Style, seed: int, habits: Habits) -> tuple[Problem, list[Span], str]:
    rng = random.Random(seed)
    problem = generate(kind, "medium", rng)
    spans, answer = write_trace(problem, style, rng, habits)
    return problem, spans, answer


@given(kinds, styles, seeds)
def test_a_careful_trace_arrives_at_the_answer(kind: Kind, style: Style, seed: int) -> None:
    """Without slips the last step states the problem's answer and everything is learned."""
    problem, spans, answer = trace(kind, style, seed, CAREFUL)
    assert problem.answer == answer
    assert re.search(rf"\b{re.escape(answer)}\.?$", text_of(spans))
    assert all(learn for _, learn in spans)


@given(kinds, styles, seeds)
def test_the_answer_returned_is_the_answer_stated_last(kind: Kind, style: Style, seed: int) -> None:
    """The boxed answer always follows from the thinking, slips or not."""
    _, spans, answer = trace(kind, style, seed, SLIPPERY)
    stated = re.findall(r"(?:answer is(?: still)?|Answer:) (-?\w+)", text_of(spans))
    assert answer == stated[-1]


@given(st.sampled_from(("chain", "expression")), styles, seeds)
def test_wrong_results_carry_no_loss_and_all_others_do(kind: Kind, style: Style, seed: int) -> None:
    """An equation is false exactly where its result is masked; what leads to it is always learned."""
    _, spans, _ = trace(kind, style, seed, SLIPPERY)
    learned = learned_characters(spans)
    for found in EQUATION.finditer(text_of(spans)):
        left, symbol, right, result = found.groups()
        true = OPERATIONS[symbol](int(left), int(right)) == int(result)
        assert {true} == set(learned[found.start(4) : found.end(4)])
        assert all(learned[found.start() : found.start(4)])


@given(seeds)
def test_masked_states_of_swaps_are_wrong_states(seed: int) -> None:
    """In a swaps trace, too, only slips are masked, and a caught slip is followed by a learned correction."""
    _, spans, _ = trace("swaps", "verbose", seed, Habits(slip=1.0, catch=1.0, again=(0.0,)))
    masked = [i for i, (_, learn) in enumerate(spans) if not learn]
    assert masked
    for i in masked:
        reaction, learn = spans[i + 1]
        assert learn
        assert reaction.startswith("\n\nWait")
        assert spans[i][0].rstrip(".") not in reaction


def test_every_slip_can_be_caught_or_missed() -> None:
    """At `catch` 0.65 some slips are corrected at once and some are not."""
    endings = []
    for seed in range(300):
        _, spans, _ = trace("chain", "verbose", seed, Habits(slip=0.15, again=(0.0,)))
        endings += ["Wait, " in spans[i + 1][0] for i, (_, learn) in enumerate(spans[:-1]) if not learn]
    assert 0.5 < mean(endings) < 0.8


def test_reflections_stand_at_the_beginning_of_a_step() -> None:
    """Wait, Hmm and Alternatively open a step, after a blank line; all three occur."""
    seen: set[str] = set()
    for seed in range(300):
        _, spans, _ = trace(KINDS[seed % 3], "verbose", seed, Habits())
        text = text_of(spans)
        for word in ("Wait", "Hmm", "Alternatively"):
            places = [found.start() for found in re.finditer(word, text)]
            assert all(text[at - 2 : at] == "\n\n" for at in places)
            seen |= {word} if places else set()
    assert {"Wait", "Hmm", "Alternatively"} == seen


def lengths(style: Style, habits: Habits) -> list[tuple[bool, int]]:
    found = []
    for seed in range(450):
        problem, spans, answer = trace(KINDS[seed % 3], style, seed, habits)
        flawless = all(learn for _, learn in spans) and problem.check(answer)
        found.append((flawless, len(text_of(spans))))
    return found


def test_trouble_makes_a_chain_longer() -> None:
    """Traces in which something went wrong are longer on average than flawless ones."""
    found = lengths("verbose", Habits())
    assert mean(n for flawless, n in found if not flawless) > 1.1 * mean(n for flawless, n in found if flawless)


def test_the_concise_style_is_much_shorter() -> None:
    """Symbols instead of sentences, and no second thoughts: under half the length."""
    concise, verbose = lengths("concise", Habits()), lengths("verbose", Habits())
    assert mean(n for _, n in concise) < 0.5 * mean(n for _, n in verbose)


def test_further_verifications_become_rarer() -> None:
    """Overthinking: most flawless traces verify again and again, until hardly any goes on."""
    habits = Habits(slip=0.0, again_slip=0.0, hurry=0.0)
    rounds = [len(re.findall("still", text_of(trace("chain", "verbose", seed, habits)[1]))) for seed in range(800)]
    assert mean(n >= 1 for n in rounds) == pytest.approx(0.95, abs=0.03)
    assert mean(n >= 4 for n in rounds) == pytest.approx(0.95 * 0.9 * 0.85 * 0.75, abs=0.06)
    assert mean(n >= 5 for n in rounds) == pytest.approx(0.95 * 0.9 * 0.85 * 0.75 * 0.3, abs=0.05)


def test_brisk_reasoning_doubts_aloud_once_at_most_and_differs_much_in_length() -> None:
    """Verifications after the first mostly begin without a word of doubt; a third of the chains has none at all."""
    habits = replace(BRISK, slip=0.0, again_slip=0.0, hurry=0.0, check_easy=0.0, check_hard=0.0)
    texts = [text_of(trace("chain", "verbose", seed, habits)[1]) for seed in range(800)]
    aloud = [sum(text.count(opening) for opening in AGAIN) for text in texts]
    rounds = [text.count("still") for text in texts]
    assert mean(n == 0 for n in rounds) == pytest.approx(0.35, abs=0.05)
    assert mean(n >= 3 for n in rounds) == pytest.approx(0.65 * 0.7 * 0.7, abs=0.05)
    assert mean(n >= 2 for n in aloud) < 0.1


@given(st.sampled_from(("chain", "expression")), seeds)
def test_a_disagreement_leads_to_another_pass(kind: Kind, seed: int) -> None:
    """Two results that differ are never left standing: the work is done a third time, and rightly."""
    problem, spans, answer = trace(kind, "verbose", seed, Habits(slip=0.5, catch=0.0, again=(0.9,), again_slip=0.0))
    text = text_of(spans)
    if "instead of" in text:
        assert "Let me check it carefully." in text
        assert problem.answer == answer
