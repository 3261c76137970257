"""Intervals for the bench: Wilson for shares, percentile bootstrap for means, ratios and differences.

Paired versions resample problems, not values: both rows are measured on the same problems, so what is hard for both
cancels. All intervals are 95% and reproducible (fixed seed). References: Wilson 1927; Efron and Tibshirani 1993; for a
few pairs, Student 1908.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, inf, sqrt

import numpy as np
from numpy.typing import NDArray

Z95 = 1.959963984540054
RESAMPLES = 10_000
# Student's t of 97.5 % for 1, 2, ... degrees of freedom; for more the last is a little long.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)

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


def ratio_of_few(numerators: Sequence[float], denominators: Sequence[float]) -> Interval:
    """Geometric mean of the ratios of a few pairs, with the t-interval of their logarithms; of one pair, no interval.

    From so few the bootstrap draws intervals that are far too short.
    """
    above, below = _pair(numerators, denominators)
    logs = np.log(above / below)
    middle = float(logs.mean())
    if logs.size == 1:
        return Interval(exp(middle), 0.0, inf)
    half = T95[min(logs.size, len(T95) + 1) - 2] * float(logs.std(ddof=1)) / sqrt(logs.size)
    return Interval(exp(middle), exp(middle - half), exp(middle + half))


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
