"""What was written: where thinking ends."""

from __future__ import annotations

import pytest

from thinkserve.steering.writer import Written, split

CLOSE, END = 7, 2


@pytest.mark.parametrize(
    ("tokens", "thinking", "closed"),
    [
        ([5, 6, CLOSE, 5, END], [5, 6], True),
        ([5, CLOSE, 6, CLOSE], [5], True),
        ([CLOSE], [], True),
        ([5, 6], [5, 6], False),
        ([5, END], [5], False),
        ([], [], False),
    ],
)
def test_thinking_is_what_comes_before_the_first_closing_tag(
    tokens: list[int], thinking: list[int], closed: bool
) -> None:
    """All when there is none, less the token that ends the sequence."""
    assert Written(tokens, thinking, closed) == split(tokens, CLOSE, (END,))


def test_a_model_without_a_closing_tag_thinks_to_the_end() -> None:
    """Nothing ever closes."""
    assert Written([5, CLOSE, END], [5, CLOSE], False) == split([5, CLOSE, END], None, (END,))
