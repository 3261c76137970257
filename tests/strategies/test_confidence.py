"""Confidence: means, windows, margins and ranks of what a chain's tokens say."""

from __future__ import annotations

from itertools import pairwise
from math import fsum, inf, nan

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinkserve.strategies.confidence import Lowest, Mean, Window, borda, close_margin, mean_certainty
from thinkserve.strategies.engine import TokenStats

VALUES = st.lists(st.floats(-1e6, 1e6), max_size=80)


def token(certainty: float = 1.0, close: float = -3.0) -> TokenStats:
    """Statistics of one token."""
    return TokenStats(certainty, entropy=1.0, margin=1.0, close=close)


@given(VALUES)
def test_the_running_mean_is_the_mean(values: list[float]) -> None:
    """However they come."""
    mean = Mean()
    mean.extend(values[:3])
    mean.extend(values[3:])

    assert len(values) == mean.count
    assert pytest.approx(fsum(values) / max(1, len(values)), rel=1e-12, abs=1e-9) == mean.value


def test_the_running_mean_does_not_drift() -> None:
    """What a huge value swallowed comes back: the naive sum would be 0."""
    mean = Mean()
    mean.extend([1.0, 1e100, 1.0, -1e100])

    assert 0.5 == mean.value


def test_one_infinite_certainty_makes_a_chain_infinitely_certain() -> None:
    """A raw logit of -inf; never a NaN, which would spoil every comparison."""
    assert inf == mean_certainty([token(1.0), token(inf), token(2.0), token(inf)])


def test_tokens_of_which_nothing_is_known_do_not_count() -> None:
    """A chain is as certain as the tokens that it drew."""
    assert 1.5 == mean_certainty([token(1.0), token(nan), token(2.0), token(nan)])
    assert 0.0 == mean_certainty([token(nan)])


@given(VALUES, st.integers(1, 30))
def test_the_window_is_the_mean_of_the_last_values(values: list[float], size: int) -> None:
    """At every moment, for every size."""
    window = Window(size)
    for count, value in enumerate(values, 1):
        window.push(value)
        last = values[max(0, count - size) : count]

        assert (count >= size) == window.full
        assert pytest.approx(fsum(last) / len(last), rel=1e-9, abs=1e-6) == window.mean


@pytest.mark.parametrize("size", [1, 7])
def test_a_window_forgets_rounding_after_one_round(size: int) -> None:
    """A huge value leaves no trace once the ring has gone round twice."""
    window = Window(size)
    for value in [1e17, *[0.1] * (2 * size)]:
        window.push(value)

    assert pytest.approx(0.1, rel=1e-12) == window.mean


@given(VALUES, st.integers(1, 30))
def test_the_lowest_window_is_the_smallest_of_all_windows(values: list[float], size: int) -> None:
    """With stride 1, however they come; a chain shorter than the window has its mean. What is no number is no value."""
    parts = [values[at : at + size] for at in range(len(values) - size + 1)] or [values]
    means = [fsum(part) / len(part) if part else 0.0 for part in parts]

    lowest = Lowest(size)
    lowest.extend(values[:5])
    lowest.extend([nan, *values[5:]])

    assert pytest.approx(min(means), rel=1e-9, abs=1e-6) == lowest.value


def test_a_window_holds_something() -> None:
    """Size 0 is a mistake of the caller."""
    with pytest.raises(ValueError, match="at least one"):
        Window(0)


@pytest.mark.parametrize(("close", "margin"), [(-3.0, 3.0), (0.5, -0.5), (-inf, inf), (nan, inf)])
def test_the_margin_is_how_far_closing_is_from_the_best(close: float, margin: float) -> None:
    """Unknown never stops anybody."""
    assert margin == close_margin(token(close=close))


def test_mean_certainty_of_nothing_is_nothing() -> None:
    """As little as a uniform distribution."""
    assert 0.0 == mean_certainty([])
    assert 2.0 == mean_certainty([token(1.0), token(3.0)])


@given(st.lists(st.floats(0, 50), max_size=20), st.floats(0, 4))
def test_borda_weights_fall_with_rank(certainties: list[float], power: float) -> None:
    """They are 1 to N to the power, each once, and the surer chain never weighs less."""
    weights = borda(certainties, power)
    pairs = sorted(zip(certainties, weights, strict=True))

    assert pytest.approx(sorted(weights)) == [place**power for place in range(1, len(weights) + 1)]
    assert all(low <= high for (a, low), (b, high) in pairwise(pairs) if a < b)


@pytest.mark.parametrize(
    ("power", "first", "second"), [(1.2, 5.278, 6.035), (2.0, 16.0, 13.0), (0.0, 1.0, 2.0), (1.507, 8.0785, 8.0785)]
)
def test_power_moves_the_decision_from_the_many_to_the_sure(power: float, first: float, second: float) -> None:
    """Ranks A > B > B > C: A and B together as in the paper's formula; they meet at about 1.507."""
    a, b, also_b, _ = borda([4.0, 3.0, 2.0, 1.0], power)

    assert pytest.approx((first, second), abs=2e-3) == (a, b + also_b)
