"""Bare practice: what is practised is right, there is much of it, and its results alone are learned."""

from __future__ import annotations

import random
import re

from hypothesis import given
from hypothesis import strategies as st

from thinkserve.train.data import spans_of
from thinkserve.train.practice import recall, sums, track
from thinkserve.train.side_tasks import Document
from thinkserve.train.tasks import OPERATIONS, generate, split_of

seeds = st.integers(0, 2**32)


def lines_of(document: Document) -> list[str]:
    assert document.thinking is not None
    return "".join(text for text, _ in document.thinking).split("\n\n")


def learned(document: Document) -> str:
    return "".join(text for text, learn in spans_of(document) if learn)


@given(seeds)
def test_of_sums_the_results_alone_are_learned(seed: int) -> None:
    """They are right, and many."""
    rng = random.Random(seed)
    document = sums(generate("chain", "easy", rng), rng)
    lines = lines_of(document)
    assert len(lines) >= 4
    for line in lines:
        left, symbol, right, result = re.fullmatch(r"(\d+)([+*-])(\d+)=(\d+)", line).groups()  # type: ignore[union-attr]
        assert OPERATIONS[symbol](int(left), int(right)) == int(result)
    results = "".join(line.partition("=")[2] for line in lines)
    assert f"{results}\n</think>\n\nDone.<|im_end|>" == learned(document)


@given(seeds)
def test_of_look_ups_the_things_alone_are_learned(seed: int) -> None:
    """Each is what the person holds."""
    rng = random.Random(seed)
    document = recall(generate("chain", "easy", rng), rng)
    holds, *asked = lines_of(document)
    assert len(asked) >= 4
    assert set(asked) <= set(holds.split(", "))
    things = "".join(f" {line.split()[1]}" for line in asked)
    assert f"{things}\n</think>\n\nDone.<|im_end|>" == learned(document)


@given(seeds)
def test_few_swaps_are_told_without_a_slip(seed: int) -> None:
    """The whole trace is learned, and its question is one of the training split."""
    rng = random.Random(seed)
    document = track(generate("chain", "easy", rng), rng)
    trace = "\n\n".join(lines_of(document))
    assert f"{trace}\n</think>\n\n{document.answer}<|im_end|>" == learned(document)
    assert "train" == split_of(document.user)
