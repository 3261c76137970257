"""One request against the client's patience: work that is cancelled the moment the client is gone.

The server's own listener reads `receive`, whatever the ASGI version promises: frameworks do not cancel plain handlers,
and a silent stream would run on where the server only reports a disconnect through `send`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from time import monotonic

from anyio import CancelScope, create_task_group
from starlette.types import Receive

Watch = Callable[[CancelScope], Awaitable[None]]


class Exchange:
    """Runs work while the client is there. `gone` is when it left, on the monotonic clock; None when it stayed."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self.gone: float | None = None

    async def run(self, work: Callable[[], Awaitable[None]], watch: Watch | None = None) -> None:
        """Run `work`, which must not raise. `watch` runs beside it and may cancel the scope it is given."""
        async with create_task_group() as group:
            group.start_soon(self._listen, group.cancel_scope)
            if watch is not None:
                group.start_soon(self._watched, watch, group.cancel_scope)
            await work()
            group.cancel_scope.cancel()

    async def _listen(self, scope: CancelScope) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._leave(scope)

    async def _watched(self, watch: Watch, scope: CancelScope) -> None:
        # A watch that ends has given the client up; so has a server that raises when asked to send.
        with suppress(OSError):
            await watch(scope)
        self._leave(scope)

    def _leave(self, scope: CancelScope) -> None:
        if self.gone is None and not scope.cancel_called:
            self.gone = monotonic()
            scope.cancel()
