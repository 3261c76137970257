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
        self._given = anyio.Event()

    @property
    def users(self) -> Mapping[str, int]:
        """How many jobs and chains use each vector that the worker holds."""
        return self._users

    @asynccontextmanager
    async def hold(self, wanted: Mapping[str, Payload]) -> AsyncIterator[None]:
        """Keep the wanted vectors in the worker for the block, as `take` does."""
        await self.take(wanted)
        try:
            yield
        finally:
            self.give(wanted)

    async def take(self, wanted: Mapping[str, Payload]) -> None:
        """Keep the wanted vectors in the worker until they are given back; waits while others use all places.

        For how long is the caller's to say: a request has its deadline. Nothing is kept meanwhile, so nobody waits for
        each other. Raises ApiError 503 for more vectors than there are places.
        """
        if len(wanted) > self._slots:
            raise _full()
        if not self._fresh(wanted):
            self._use(wanted)
            return
        # First come, first served: whoever needs a place waits for the lock, or, with the lock, for a place.
        async with self._lock:
            while fresh := self._fresh(wanted):
                if len(self._users) < self._slots or self._idle(wanted):
                    await self._load(fresh[0], wanted)
                else:
                    await self._given.wait()
            self._use(wanted)

    def give(self, wanted: Mapping[str, Payload]) -> None:
        """Vectors that were taken are no longer needed."""
        for name in wanted:
            self._users[name] -= 1
        self._given.set()
        self._given = anyio.Event()

    def _use(self, wanted: Mapping[str, Payload]) -> None:
        for name in wanted:
            self._users[name] = self._users.pop(name) + 1

    def _fresh(self, wanted: Mapping[str, Payload]) -> list[str]:
        return [name for name in wanted if name not in self._users]

    def _idle(self, wanted: Mapping[str, Payload]) -> list[str]:
        return [name for name, users in self._users.items() if not users and name not in wanted]

    async def _load(self, name: str, wanted: Mapping[str, Payload]) -> None:
        # Shielded: a caller who leaves in the middle must not leave the two sides with different ideas.
        with anyio.CancelScope(shield=True):
            if len(self._users) >= self._slots:
                idle = self._idle(wanted)[0]
                del self._users[idle]
                await self._call("drop", idle)
            if not all(await self._call("load", name, {layer: bytes(view) for layer, view in wanted[name].items()})):
                raise _full()
            self._users[name] = 0


class Kept:
    """The vectors of one chain: it keeps them between its segments, lest others take their places meanwhile."""

    def __init__(self, loaded: LoadedVectors) -> None:
        self._loaded = loaded
        self._held: Mapping[str, Payload] = {}

    async def change(self, wanted: Mapping[str, Payload]) -> None:
        """Hold these vectors in place of those before, as `take` does."""
        # What is loaded and wanted again is taken in the same turn of the event loop.
        self.release()
        await self._loaded.take(wanted)
        self._held = wanted

    def release(self) -> None:
        """Hold none any more."""
        held, self._held = self._held, {}
        if held:
            self._loaded.give(held)


def _full() -> ApiError:
    message = "All places for steering vectors are in use by running requests; try again."
    return ApiError(503, "steering_busy", message, "overloaded_error", None, retry_after())
