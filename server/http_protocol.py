"""uvicorn's h11 protocol with what it lacks: a time limit for request heads, and our error shape for what is not HTTP.

h11 it must be: the faster parser has no limit on the size of headers.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from http import HTTPStatus

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from thinkserve.server.asgi import error_message
from thinkserve.server.errors import ApiError

HEAD_TIMEOUT_S = 10.0
STALL_MS = 90_000


class Protocol(H11Protocol):
    """One connection."""

    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start the clock for the first request's head."""
        super().connection_made(transport)  # type: ignore[arg-type]
        _give_up_stalled(transport)
        self._time_head()

    def data_received(self, data: bytes) -> None:
        """Parse; the clock runs while a head is incomplete."""
        super().data_received(data)
        if self.conn.their_state is h11.IDLE:
            self._time_head()
        else:
            self._stop_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the clock."""
        self._stop_timer()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Tell what was wrong, as h11 names it, and close."""
        cause = sys.exc_info()[1]
        status = getattr(cause, "error_status_hint", 400)
        self._close_with(status, "headers_too_large" if status == 431 else "invalid_request", msg)

    def _time_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._head_late)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_late(self) -> None:
        self._head_timer = None
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
