"""Intervals for the bench: Wilson for shares, percentile bootstrap for means, ratios and differences.

Paired versions resample problems, not values: both rows are measured on the same problems, so what is hard for both
cancels. All intervals are 95% and reproducible (fixed seed). References: Wilson 1927; Efron and Tibshirani 1993.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np
from numpy.typing import NDArray

Z95 = 1.959963984540054
RESAMPLES = 10_000

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Interval:
    """A measured value and its 95% interval."""

    value: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        """`value [low, high]`, each number formatted by `spec`."""
        return f"{self.value:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


def wilson(successes: int, trials: int) -> Interval:
    """Share of successes with Wilson's score interval. ValueError unless 0 <= successes <= trials, trials > 0."""
    if not 0 <= successes <= trials or trials == 0:
        raise ValueError(f"{successes} successes in {trials} trials")
    share, spread = successes / trials, Z95**2 / trials
    centre = (share + spread / 2) / (1 + spread)
    half = sqrt(share * (1 - share) * spread + spread**2 / 4) / (1 + spread)
    return Interval(share, max(0.0, centre - half), min(1.0, centre + half))


def mean(values: Sequence[float], seed: int = 0) -> Interval:
    """Arithmetic mean; the interval comes from resampling the values."""
    data = _array(values)
    return _interval(float(data.mean()), data[_draw(data.size, seed)].mean(axis=1))


def paired_ratio(numerators: Sequence[float], denominators: Sequence[float], seed: int = 0) -> Interval:
    """Ratio of the means of two rows measured on the same problems, resampled together."""
    above, below = _pair(numerators, denominators)
    picks = _draw(above.size, seed)
    return _interval(float(above.mean() / below.mean()), above[picks].mean(axis=1) / below[picks].mean(axis=1))


def paired_difference(left: Sequence[float], right: Sequence[float], seed: int = 0) -> Interval:
    """Difference of the means of two rows measured on the same problems."""
    first, second = _pair(left, right)
    return mean((first - second).tolist(), seed)


def _array(values: Sequence[float]) -> Array:
    if not values:
        raise ValueError("no values")
    return np.asarray(values, dtype=np.float64)


def _pair(left: Sequence[float], right: Sequence[float]) -> tuple[Array, Array]:
    if len(left) != len(right):
        raise ValueError(f"{len(left)} and {len(right)} values do not pair")
    return _array(left), _array(right)


def _draw(size: int, seed: int) -> NDArray[np.int64]:
    """Indices of all resamples, [RESAMPLES, size]."""
    return np.random.default_rng(seed).integers(0, size, (RESAMPLES, size))


def _interval(value: float, resampled: Array) -> Interval:
    low, high = np.quantile(resampled, (0.025, 0.975))
    return Interval(value, float(low), float(high))
