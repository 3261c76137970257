"""A circuit breaker: a server that failed several times in a row is left alone for a while, then tried by one call.

Whoever is refused knows at once, instead of waiting for another timeout. Synchronous and free of I/O.
"""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic


class Breaker:
    """Opens after `limit` failures in a row; `cooldown_s` seconds later one call may try again, and so on."""

    def __init__(self, limit: int, cooldown_s: float, clock: Callable[[], float] = monotonic) -> None:
        self._limit = limit
        self._cooldown_s = cooldown_s
        self._clock = clock
        self._failures = 0
        self._again = 0.0

    @property
    def open(self) -> bool:
        """Whether a call would be refused now."""
        return self._failures >= self._limit and self._clock() < self._again

    def admit(self) -> bool:
        """Whether this call may go out. Of those that come when the time is up, the first is the trial."""
        if self.open:
            return False
        # A trial that is cancelled never says how it went: after another pause the next one may go.
        self._again = self._clock() + self._cooldown_s
        return True

    def answered(self) -> None:
        """The server speaks again: others may follow a trial, but one more failure closes the door at once."""
        self._failures = min(self._failures, self._limit - 1)

    def succeeded(self) -> None:
        """A call has come to a good end."""
        self._failures = 0

    def failed(self) -> None:
        """A call has failed by the server's fault."""
        self._failures += 1
        self._again = self._clock() + self._cooldown_s
