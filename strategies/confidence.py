"""How sure a chain is of itself, from the statistics of its tokens: pure functions and small running figures.

Certainty is the divergence of a step's distribution from the uniform one (self-certainty, arXiv:2502.18581, section 3):
0 knows nothing, more is surer. The margin to the end of thinking is that of ThinkBrake (arXiv:2510.00546).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import fsum, inf, isnan
from typing import Protocol

from thinkserve.strategies.engine import TokenStats


class Figure(Protocol):
    """What is known of a chain from its tokens so far."""

    @property
    def value(self) -> float:
        """The figure."""

    def extend(self, values: Iterable[float]) -> None:
        """Take the values of more tokens."""


class Mean:
    """The mean of all values so far, in constant memory; 0 without any. What is not a number is no value."""

    __slots__ = ("_lost", "_sum", "count")

    def __init__(self) -> None:
        self.count = 0
        self._sum = 0.0
        self._lost = 0.0

    @property
    def value(self) -> float:
        """The mean."""
        return (self._sum + self._lost) / self.count if self.count else 0.0

    def extend(self, values: Iterable[float]) -> None:
        """Take more values; what each addition rounds off is kept (Neumaier), so long chains do not drift."""
        for value in values:
            if isnan(value):
                continue
            total = self._sum + value
            large, small = (self._sum, value) if abs(self._sum) >= abs(value) else (value, self._sum)
            rest = (large - total) + small
            # Infinite certainty (a raw logit of -inf) has no rest.
            self._lost += 0.0 if isnan(rest) else rest
            self._sum = total
            self.count += 1


class Window:
    """The mean of the last `size` values, in a ring; ValueError unless size > 0.

    The running sum is taken anew whenever the ring has gone round, so rounding errors live for one round at most.
    """

    __slots__ = ("_at", "_ring", "_sum", "size")

    def __init__(self, size: int) -> None:
        if size < 1:
            raise ValueError("a window holds at least one value")
        self.size = size
        self._ring: list[float] = []
        self._at = 0
        self._sum = 0.0

    @property
    def full(self) -> bool:
        """Whether `size` values have come."""
        return len(self._ring) == self.size

    @property
    def mean(self) -> float:
        """The mean of what the window holds; 0 while that is nothing."""
        return self._sum / len(self._ring) if self._ring else 0.0

    def push(self, value: float) -> None:
        """Take the next value; a full window forgets its oldest."""
        if self.full:
            self._sum += value - self._ring[self._at]
            self._ring[self._at] = value
        else:
            self._sum += value
            self._ring.append(value)
        self._at = (self._at + 1) % self.size
        if self._at == 0:
            self._sum = fsum(self._ring)


class Lowest:
    """The smallest mean of `size` neighbours so far (DeepConf, arXiv:2508.15260, section 3).

    Of fewer values the mean of all; 0 without any. What is not a number is no value.
    """

    __slots__ = ("_lowest", "_window")

    def __init__(self, size: int) -> None:
        self._window, self._lowest = Window(size), inf

    @property
    def value(self) -> float:
        """The smallest mean."""
        return self._lowest if self._window.full else self._window.mean

    def extend(self, values: Iterable[float]) -> None:
        """Take more values."""
        for value in values:
            if not isnan(value):
                self._window.push(value)
                if self._window.full:
                    self._lowest = min(self._lowest, self._window.mean)


def mean_certainty(stats: Iterable[TokenStats]) -> float:
    """Self-certainty of a chain: the mean over its tokens, 0 without any."""
    mean = Mean()
    mean.extend(each.certainty for each in stats)
    return mean.value


def close_margin(stats: TokenStats) -> float:
    """ln p(best token but the close) - ln p(close), in nats: at most 0 where closing is the best; inf if not known."""
    return inf if isnan(stats.close) else -stats.close


def borda(certainties: Sequence[float], power: float) -> list[float]:
    """Weight of each chain's vote: (N - rank + 1) ** power, where the surest of N has rank 1 (arXiv:2502.18581).

    Power 0 is a plain majority; the larger it is, the more the surest chain decides. Of equals the earlier ranks first.
    """
    order = sorted(range(len(certainties)), key=lambda at: (-certainties[at], at))
    weights = [0.0] * len(order)
    for place, at in enumerate(order):
        weights[at] = float((len(order) - place) ** power)
    return weights
