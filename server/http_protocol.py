"""uvicorn's h11 protocol with what it lacks: time limits for request heads and for bodies that come after their answer,
and our error shape for what is not HTTP.

h11 it must be: the faster parser has no limit on the size of headers.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from http import HTTPStatus
from typing import Literal

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from thinkserve.server.asgi import error_message
from thinkserve.server.errors import ApiError

HEAD_TIMEOUT_S = 10.0
LINGER_S = 5.0
STALL_MS = 90_000
MOST_EARLY = 64 * 1024


class Protocol(H11Protocol):
    """One connection. Whatever the client is to send next, some clock runs for it, here or in uvicorn."""

    _owed: Literal["head", "body"] | None = None
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start the clock for the first request's head."""
        super().connection_made(transport)  # type: ignore[arg-type]
        _give_up_stalled(transport)
        self._time("head")

    def data_received(self, data: bytes) -> None:
        """Parse; any data stops uvicorn's clock for idle connections, so it is started anew where nothing has begun."""
        super().data_received(data)
        self._read_on()
        self._time(self._owing())
        if self.conn.their_state is h11.IDLE and self._owed is None:
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def _read_on(self) -> None:
        # uvicorn stops reading when the next request comes early; then nobody would notice that the client leaves.
        if self.conn.their_state is h11.DONE and len(self.conn.trailing_data[0]) <= MOST_EARLY:
            self.flow.resume_reading()

    def on_response_complete(self) -> None:
        """Go on with the next request; a body that was answered before it had come has `LINGER_S` left."""
        super().on_response_complete()
        self._time(self._owing())

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the clock."""
        self._time(None)
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Tell what was wrong, as h11 names it, and close."""
        cause = sys.exc_info()[1]
        status = getattr(cause, "error_status_hint", 400)
        self._close_with(status, "headers_too_large" if status == 431 else "invalid_request", msg)

    def _owing(self) -> Literal["head", "body"] | None:
        """What the client has begun to send and nothing but our clock bounds."""
        ours, theirs = self.conn.our_state, self.conn.their_state
        if ours is h11.DONE and theirs is h11.SEND_BODY:
            return "body"
        return "head" if theirs is h11.IDLE and self.conn.trailing_data[0] else None

    def _time(self, owed: Literal["head", "body"] | None) -> None:
        """Run the clock for what is owed; more data of the same does not set it back."""
        if owed == self._owed:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._owed, self._timer = owed, None
        if owed == "head":
            self._timer = self.loop.call_later(HEAD_TIMEOUT_S, self._head_late)
        elif owed == "body":
            # The answer is on its way; closing at once could lose it to a client that is still sending.
            self._timer = self.loop.call_later(LINGER_S, self.timeout_keep_alive_handler)

    def _head_late(self) -> None:
        if not self.transport.is_closing():
            self._close_with(408, "request_timeout", "The request's head did not arrive in time.")

    def _close_with(self, status: int, code: str, message: str) -> None:
        if self.conn.our_state in {h11.IDLE, h11.SEND_RESPONSE}:
            content, headers = error_message(ApiError(status, code, message, headers={"Connection": "close"}))
            reason = HTTPStatus(status).phrase.encode()
            for event in (h11.Response(status_code=status, headers=headers, reason=reason), h11.Data(data=content)):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


def _give_up_stalled(transport: asyncio.BaseTransport) -> None:
    # Closing waits until a client has taken what was sent; one that never does would keep its connection for ever.
    connection: socket.socket | None = transport.get_extra_info("socket")
    if connection is not None and connection.family in {socket.AF_INET, socket.AF_INET6}:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, STALL_MS)
