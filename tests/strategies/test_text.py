"""Text helpers as tables, and the state machine of phases as properties."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinkserve.strategies.engine import ModelInfo, Phase, Tokens
from thinkserve.strategies.text import Phases, answer_of, bare_option, before, boxed, final_number, option, steps

SHORT_TAGS = ModelInfo("m", 99, 99, eos=(0,), think_open=(1,), think_close=(2,))
LONG_TAGS = ModelInfo("m", 99, 99, eos=(0,), think_open=(1, 1, 3), think_close=(1, 2, 1, 4))
NO_TAGS = ModelInfo("m", 99, 99, eos=(0,))


def label(info: ModelInfo, phase: Phase | None, *parts: Tokens) -> tuple[str, Phases]:
    """One letter per labelled token (t or a), h per token still held; the machine."""
    phases = Phases(info, phase)
    runs = [run for part in parts for run in phases.push(part)]
    return "".join(name[0] * count for name, count in runs) + "h" * phases.held, phases


@pytest.mark.parametrize(
    ("wanted", "left"), [((2,), (1,)), ((2, 3), (1,)), ((3, 2), (1, 2)), ((9,), (1, 2, 3, 2)), ((), (1, 2, 3, 2))]
)
def test_what_comes_before_a_tag_goes_up_to_its_first(wanted: Tokens, left: Tokens) -> None:
    """It is everything where there is none, or nothing to look for."""
    assert left == before((1, 2, 3, 2), wanted)


@pytest.mark.parametrize(
    ("phase", "tokens", "labels", "length"),
    [
        ("thinking", (7, 7, 2, 8), "ttta", 2),
        ("thinking", (2, 8), "ta", 0),
        ("thinking", (7, 7), "tt", 2),
        ("thinking", (7, 2, 8, 2, 1), "ttaaa", 1),
        ("answer", (7, 1, 2), "aaa", 0),
        (None, (1, 7, 2, 8), "ttta", 1),
        (None, (8, 8), "aa", 0),
        (None, (8, 1, 7, 2, 8), "attta", 1),
        (None, (8, 2, 1, 7), "aaaa", 0),
    ],
)
def test_tokens_are_labelled_by_the_tags_around_them(
    phase: Phase | None, tokens: Tokens, labels: str, length: int
) -> None:
    """Tags count as thinking, but not in its length; the first closing tag ends it for good."""
    found, phases = label(SHORT_TAGS, phase, tokens)

    assert (labels, length) == (found, phases.length)


@pytest.mark.parametrize(
    ("phase", "tokens", "labels", "length"),
    [
        ("thinking", (7, 1, 2, 1, 4, 8), "ttttta", 1),
        ("thinking", (1, 2, 1, 2, 1, 4, 8), "tttttta", 2),
        ("thinking", (7, 1, 2), "ttt", 1),
        (None, (1, 1, 3, 7, 1, 2, 1, 4, 8), "tttttttta", 1),
        (None, (1, 1, 1, 3, 7), "atttt", 1),
        (None, (1, 1, 8), "aaa", 0),
        (None, (8, 1, 1), "ahh", 0),
    ],
)
def test_tags_may_be_several_tokens_long(phase: Phase | None, tokens: Tokens, labels: str, length: int) -> None:
    """A tag that only begins is text; one that may yet be completed is held or not counted."""
    found, phases = label(LONG_TAGS, phase, tokens)

    assert (labels, length) == (found, phases.length)


def test_a_model_without_tags_only_answers() -> None:
    """Whatever phase the task claims."""
    assert "aa" == label(NO_TAGS, "thinking", (7, 2))[0]


@given(
    st.sampled_from([SHORT_TAGS, LONG_TAGS]),
    st.sampled_from(["thinking", "answer", None]),
    st.lists(st.integers(1, 5), max_size=30),
    st.lists(st.integers(0, 30), max_size=5),
)
def test_labels_do_not_depend_on_how_tokens_are_cut_into_deltas(
    info: ModelInfo, phase: Phase | None, tokens: list[int], cuts: list[int]
) -> None:
    """The same labels and length for every partition; no token lost; length never above the truth."""
    edges = [0, *sorted(cuts), len(tokens)]
    parts = [tuple(tokens[a:b]) for a, b in pairwise(edges)]

    whole, one = label(info, phase, tuple(tokens))
    cut, many = label(info, phase, *parts)

    assert (whole, one.length, one.closed) == (cut, many.length, many.closed)
    assert len(tokens) == len(whole)
    assert one.length <= whole.count("t")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{42}.", "42"),
        (r"\boxed{1} then \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{7} and \boxed{8", "7"),
        (r"{ \boxed{4}", "4"),
        (r"\boxed{ {1} ", None),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed {5}", "5"),
        (r"\boxed{}", None),
        (r"} } \fbox{6}", "6"),
        ("no box", None),
    ],
)
def test_the_last_balanced_box_is_the_answer(text: str, answer: str | None) -> None:
    """Braces nest; an unclosed or empty box is none."""
    assert answer == boxed(text)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("12 or 13", "13"),
        ("about 1,234,567.5 in all", "1,234,567.5"),
        ("10-5", "5"),
        ("x = -5.", "-5"),
        ("it is \u22127", "\u22127"),
        ("costs -$5.50", "-5.50"),
        ("so 3/4 of it", "3/4"),
        ("50 %", "50%"),
        ("it is 2 1/2.", "2 1/2"),
        ("3 / 4", "3/4"),
        (r"50\% of", r"50\%"),
        ("= .5", ".5"),
        ("1.5e-3", "1.5e-3"),
        ("12,3456", "3456"),
        ("60km", "60"),
        ("none", None),
    ],
)
def test_the_last_number_is_taken_whole(text: str, answer: str | None) -> None:
    """With sign, separators, decimals, exponent, fraction, percent."""
    assert answer == final_number(text)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Answer: C", "C"),
        ("The answer is (b), since 3 > 2", "B"),
        ("**Answer:** D.", "D"),
        ("Answer: A\n", "A"),
        ("Answer: A train takes 3 hours", None),
        ("the answer is unknown", None),
    ],
)
def test_a_cued_letter_is_an_option(text: str, answer: str | None) -> None:
    """Only a letter that stands alone."""
    assert answer == option(text)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"Answer: B. That is \boxed{3}", "3"),
        ("I pick 3 and 4. Answer: (C)", "C"),
        ("(A) is wrong, (B) it is", "B"),
        ("(A) has 7", "7"),
        ("I do not know", None),
        ("", None),
    ],
)
def test_rules_for_answers_have_an_order(text: str, answer: str | None) -> None:
    """Box, cued letter, number, bracketed letter."""
    assert answer == answer_of(text)


def test_a_bracketed_letter_stands_alone() -> None:
    """f(A) is a function."""
    assert bare_option("f(A)") is None


@given(st.text(alphabet="ab\n ", max_size=40))
def test_steps_add_up_to_the_text(text: str) -> None:
    """Nothing is lost, and every step but the last ends in a blank line."""
    parts = steps(text)

    assert text == "".join(parts)
    assert all(part.endswith("\n\n") for part in parts[:-1])


def test_steps_are_cut_after_blank_lines() -> None:
    """Runs of newlines belong to the step before them."""
    assert ["a\n\n", "b\nc\n\n\n", "d"] == steps("a\n\nb\nc\n\n\nd")


@pytest.mark.parametrize(
    "text",
    [
        "\\boxed{" * 150_000,
        "1,111" * 200_000,
        "\n" * 1_000_000,
        "answer" + " *" * 500_000,
        ("\\boxed" + " " * 600) * 1600,
    ],
    ids=["open boxes", "digits", "newlines", "stars", "spaces"],
)
def test_hostile_text_takes_linear_time(text: str) -> None:
    """A megabyte of the worst is done in well under two seconds."""
    started = time.monotonic()

    answer_of(text)
    steps(text)

    assert time.monotonic() - started < 2
