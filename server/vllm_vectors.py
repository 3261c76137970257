"""Which steering vectors the worker holds: loaded before first use, kept while used, and after that as room allows.

Only the front end decides; the worker carries out. A vector is known to both by its content, so a replaced one and its
replacement are two vectors, and each goes when nobody needs it and another needs its place.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import anyio

from thinkserve.server.errors import ApiError, retry_after
from thinkserve.server.vllm_controls import Payload

Call = Callable[..., Awaitable[list[Any]]]


class LoadedVectors:
    """The worker's table of `slots` vectors. `call(method, *args)` reaches the steering of every rank."""

    def __init__(self, call: Call, slots: int) -> None:
        self._call = call
        self._slots = slots
        # Users of each loaded vector; the order is that of last use.
        self._users: dict[str, int] = {}
        self._lock = anyio.Lock()

    @property
    def users(self) -> Mapping[str, int]:
        """How many jobs use each vector that the worker holds."""
        return self._users

    @asynccontextmanager
    async def hold(self, wanted: Mapping[str, Payload]) -> AsyncIterator[None]:
        """Keep the wanted vectors in the worker for the block. Raises ApiError 503 when all places are in use."""
        held: list[str] = []
        try:
            for name, payload in wanted.items():
                if name not in self._users:
                    await self._load(name, payload, wanted)
                self._users[name] = self._users.pop(name) + 1
                held.append(name)
            yield
        finally:
            for name in held:
                self._users[name] -= 1

    async def _load(self, name: str, payload: Payload, wanted: Mapping[str, Payload]) -> None:
        # Shielded: a caller who leaves in the middle must not leave the two sides with different ideas.
        with anyio.CancelScope(shield=True):
            async with self._lock:
                if name in self._users:
                    return
                if len(self._users) >= self._slots:
                    await self._make_room(wanted)
                if not all(await self._call("load", name, dict(payload))):
                    raise _full()
                self._users[name] = 0

    async def _make_room(self, wanted: Mapping[str, Payload]) -> None:
        idle = next((name for name, users in self._users.items() if not users and name not in wanted), None)
        if idle is None:
            raise _full()
        del self._users[idle]
        await self._call("drop", idle)


def _full() -> ApiError:
    message = "All places for steering vectors are in use by running requests; try again."
    return ApiError(503, "steering_busy", message, "overloaded_error", None, retry_after())
