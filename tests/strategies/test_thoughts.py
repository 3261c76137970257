"""Thinking cut into thoughts: at paragraphs that turn round, else at every paragraph; and what a verifier is shown."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinkserve.strategies.testing import ScriptedEngine
from thinkserve.strategies.thoughts import Segmenter, excerpt, result

TEXT = "First 1.\n\nSo 2.\n\nWait, no.\n\nSo 3.\n\n\nHmm, check.\n\nBut then\nall is well.\n\nWaiting ends."


def thoughts(text: str, size: int = 1, **options: int) -> list[tuple[str, ...]]:
    segments = Segmenter(**options)  # type: ignore[arg-type]
    return [thought for at in range(0, len(text), size) for thought in segments.push(text[at : at + size])]


@given(size=st.integers(1, 30))
def test_a_marker_after_a_blank_line_ends_a_thought(size: int) -> None:
    """Whatever the pieces that the text comes in; a word that only begins like a marker does not."""
    expected = [("First 1.", "So 2."), ("Wait, no.", "So 3."), ("Hmm, check.",)]
    assert expected == thoughts(TEXT + "\n\n", size)[:3]
    assert 3 == len(thoughts(TEXT + "\n\n", size))


def test_a_thought_ends_when_the_next_has_shown_itself() -> None:
    """As soon as its first words cannot be anything else."""
    assert [] == thoughts("So 2.\n\nWait")
    assert [("So 2.",)] == thoughts("So 2.\n\nWait, and let me")


@pytest.mark.parametrize("patience", [0, 2, 5])
def test_without_markers_every_paragraph_is_a_thought_after_a_while(patience: int) -> None:
    """The first thought is all that was waited for."""
    text = "\n\n".join(f"This is paragraph {n} of several." for n in range(9))

    first, *rest = thoughts(text, patience=patience)

    assert patience + 1 == len(first)
    assert [1] * (7 - patience) == [len(thought) for thought in rest]


def test_a_model_that_has_used_a_marker_uses_them() -> None:
    """Then paragraphs alone end nothing, however many there are."""
    text = "One.\n\nWait, two.\n\n" + "A plain paragraph of text.\n\n" * 9
    assert [("One.",)] == thoughts(text, patience=1)


def test_the_end_of_a_thought_is_shown_in_one_line() -> None:
    """The last paragraphs, joined by spaces; of long ones the last tokens, in those of the model that wrote them."""
    engine = ScriptedEngine([""], roles=("target",))
    thought = ("Opening.", "So 3+4=7.", "So the answer is 7.")

    assert "So 3+4=7. So the answer is 7." == excerpt(thought, 2, 99, engine)
    assert "is 7." == excerpt(thought, 2, 5, engine)
    assert "Opening. So 3+4=7. So the answer is 7." == excerpt(thought, 9, 99, engine)


@pytest.mark.parametrize(
    ("excerpt", "stated"),
    [
        ("733+19=752. So the answer is still 752.", "752"),
        ("Bob ball. So the answer is ball.", "ball"),
        (r"Hence \boxed{\frac12} of 7.", r"\frac12"),
        ("Therefore the answer is (C).", "C"),
        ("so", "so"),
        ("", ""),
        (" ", ""),
    ],
)
def test_the_result_is_the_answer_or_the_last_word(excerpt: str, stated: str) -> None:
    """As the server reads answers everywhere else."""
    assert stated == result(excerpt)
