"""Who may come in: a bound on requests at work and on the KV tokens that they may hold, and none once draining.

All chains of a request are admitted together or not at all. Nobody waits here: the engine has a queue of its own, and
what is more than it will get to is better told so at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import anyio

from thinkserve.server.errors import ApiError, draining, retry_after
from thinkserve.server.metrics import Metrics
from thinkserve.server.plan import Plan

# Few chains get as long as they may, so the engine's cache is promised several times over; it queues what does not fit.
OVERCOMMIT = 16


class Admission:
    """The door of one server. `kv_tokens` is the capacity of the engine's cache."""

    def __init__(self, max_inflight: int, kv_tokens: int, metrics: Metrics) -> None:
        self._max_inflight = max_inflight
        self._most = OVERCOMMIT * kv_tokens
        self._metrics = metrics
        self.inflight = 0
        self.cost = 0
        self.draining = False
        self._idle = anyio.Event()
        self._idle.set()

    def drain(self) -> None:
        """Take no more requests."""
        self.draining = True
        self._metrics.draining.set(1)

    async def idle(self) -> None:
        """Return when no request is at work."""
        await self._idle.wait()

    def check(self) -> None:
        """ApiError 503 when there is no place."""
        if self.draining:
            self._metrics.rejected("draining")
            raise draining({**retry_after(5, 30), "Connection": "close"})
        if self.inflight >= self._max_inflight:
            self._metrics.rejected("inflight")
            raise _overloaded(f"{self.inflight} requests are at work; this server takes no more at once.")

    @contextmanager
    def place(self) -> Iterator[None]:
        """Hold a place, from before it is known what the request wants. ApiError 503 when there is none."""
        self.check()
        self._move(1)
        try:
            yield
        finally:
            self._move(-1)

    @contextmanager
    def charge(self, plan: Plan) -> Iterator[None]:
        """Count what the request may cost while inside. ApiError 503 when that is too much."""
        # Alone a request may cost what it will: the engine runs what fits and queues the rest.
        if self.cost and self.cost + plan.cost > self._most:
            self._metrics.rejected("cost")
            raise _overloaded("The requests at work may already fill the engine's cache several times over.")
        self._spend(plan.cost)
        try:
            yield
        finally:
            self._spend(-plan.cost)

    def _move(self, requests: int) -> None:
        self.inflight += requests
        if self.inflight == 0:
            self._idle.set()
        elif self._idle.is_set():
            self._idle = anyio.Event()
        self._metrics.inflight.set(self.inflight)

    def _spend(self, cost: int) -> None:
        self.cost += cost
        self._metrics.queue_cost.set(self.cost)


def _overloaded(message: str) -> ApiError:
    return ApiError(503, "overloaded", message, "overloaded_error", None, retry_after())
