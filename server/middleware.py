"""Pure ASGI middlewares around the app: identity and headers of every response, and what is refused before routing.

Order, from outside: RequestContext, Guard, (auth.Auth), BodyLimit. All errors have the one shape, unforeseen ones too.
"""

from __future__ import annotations

import logging
import re
import secrets
from fnmatch import fnmatchcase
from ipaddress import ip_address
from time import perf_counter, time_ns

from anyio import current_time, fail_after, move_on_after
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from thinkserve.server.asgi import header, refuse
from thinkserve.server.errors import NO_RETRY, ApiError, from_exception
from thinkserve.server.settings import Settings

logger = logging.getLogger("thinkserve")

CLIENT_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
MAX_HEADERS = 128
MAX_HEADER_BYTES = 64 * 1024
BODY_TIMEOUT_S = 30.0
LINGER_S = 2.0
LOOPBACK = ("localhost", "*.localhost", "127.0.0.1", "[::1]")
PROBES = frozenset({"/health", "/livez", "/readyz"})
SECURITY_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"content-security-policy", b"default-src 'self'; frame-ancestors 'none'"),
]


def new_request_id() -> str:
    """An id of ours: a UUIDv7 in hex, so ids sort by time and never meet."""
    version, variant = 7 << 76, 2 << 62
    random = secrets.randbits(74)
    value = (time_ns() // 10**6) << 80 | version | (random >> 62) << 64 | variant | (random & (2**62 - 1))
    return f"req_{value:032x}"


class RequestContext:
    """Gives every request an id and every response its headers; turns what nobody caught into a 500."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on with `request_id` and `client_id` in the scope's state."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, request_id = perf_counter(), new_request_id()
        theirs = _client_id(scope)
        scope.setdefault("state", {}).update(request_id=request_id, client_id=theirs)
        begun = False

        async def send_with_headers(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                message["headers"] = _headers(message, request_id, theirs, perf_counter() - started)
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except ClientDisconnect:
            # It left before its body was complete: there is nobody to answer, and nothing went wrong here.
            return
        except Exception as error:
            logger.exception("request %s failed", request_id)
            if begun:
                # Too late for a status; the server closes the connection, so that the client notices.
                raise
            await refuse(from_exception(error, request_id), send_with_headers)


def _client_id(scope: Scope) -> str | None:
    value = header(scope, b"x-request-id")
    return value.decode() if value is not None and CLIENT_ID.fullmatch(value) else None


def _headers(message: Message, request_id: str, theirs: str | None, seconds: float) -> list[tuple[bytes, bytes]]:
    headers: list[tuple[bytes, bytes]] = list(message.get("headers", ()))
    headers += SECURITY_HEADERS
    headers.append((b"x-request-id", request_id.encode()))
    headers.append((b"openai-processing-ms", str(round(seconds * 1000)).encode()))
    if theirs is not None:
        headers.append((b"x-client-request-id", theirs.encode()))
    if not any(name == b"cache-control" for name, _ in headers):
        headers.append((b"cache-control", b"no-store"))
    return headers


def answered_hosts(settings: Settings, keyed: bool) -> tuple[str, ...]:
    """The hosts that requests may be meant for.

    A web page may let a name of its own point to this machine, and is then allowed to read what it asks of it: without
    keys nothing but the Host header tells.
    """
    if settings.allowed_hosts:
        return settings.allowed_hosts
    return ("*",) if keyed or not _is_loopback(settings.host) else LOOPBACK


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


class Guard:
    """Refuses requests by their headers: too many, too large, ambiguous in length, or meant for another host."""

    def __init__(self, app: ASGIApp, allowed_hosts: tuple[str, ...]) -> None:
        self._app = app
        self._hosts = tuple(host.lower() for host in allowed_hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, or answer 400 or 431."""
        error = self._fault(scope) if scope["type"] == "http" else None
        if error is None:
            await self._app(scope, receive, send)
        else:
            await refuse(error, send)

    def _fault(self, scope: Scope) -> ApiError | None:
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        if len(headers) > MAX_HEADERS or sum(len(name) + len(value) for name, value in headers) > MAX_HEADER_BYTES:
            return _closing(431, "headers_too_large", "The request has too many or too large headers.")
        names = [name for name, _ in headers]
        if b"transfer-encoding" in names and b"content-length" in names:
            return _closing(400, "invalid_request", "Content-Length and Transfer-Encoding exclude each other.")
        if not self._knows(header(scope, b"host")) and scope["path"] not in PROBES:
            return _closing(400, "invalid_host", "This server does not answer for that host (allowed_hosts).")
        return None

    def _knows(self, host: bytes | None) -> bool:
        if "*" in self._hosts:
            return True
        name = re.sub(r":\d+$", "", (host or b"").decode("latin-1").lower())
        # An address in brackets is no pattern.
        return name in self._hosts or any("*" in known and fnmatchcase(name, known) for known in self._hosts)


class BodyLimit:
    """Bounds the size of a request's body, with and without a declared length, and the time it may take to arrive."""

    def __init__(self, app: ASGIApp, max_bytes: int, timeout_s: float = BODY_TIMEOUT_S) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on; 413 or 408 out of `receive`, or at once when the declared length is too large."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = _Body(receive, send, self._max_bytes, self._timeout_s)
        if int(header(scope, b"content-length") or 0) > self._max_bytes:
            await refuse(body.too_large(), body.send)
        else:
            await self._app(scope, body.receive, body.send)


class _Body:
    def __init__(self, receive: Receive, send: Send, max_bytes: int, timeout_s: float) -> None:
        self._receive, self._send = receive, send
        self._max_bytes, self._timeout_s = max_bytes, timeout_s
        self._deadline = current_time() + timeout_s
        self._size = 0
        self._complete = False
        self._refused = False

    def too_large(self) -> ApiError:
        self._refused = True
        return _closing(413, "body_too_large", f"The request's body exceeds {self._max_bytes} bytes.")

    async def receive(self) -> Message:
        if self._complete:
            return await self._receive()
        try:
            with fail_after(max(0.0, self._deadline - current_time())):
                message = await self._receive()
        except TimeoutError:
            self._refused = True
            text = f"The request's body did not arrive within {self._timeout_s:g} seconds."
            raise _closing(408, "request_timeout", text) from None
        self._size += len(message.get("body", b""))
        self._complete = not message.get("more_body", False)
        if self._size > self._max_bytes:
            raise self.too_large()
        return message

    async def send(self, message: Message) -> None:
        last = self._refused and message["type"] == "http.response.body" and not message.get("more_body", False)
        await self._send({**message, "more_body": True} if last else message)
        if last:
            await self._linger()
            await self._send({"type": "http.response.body", "body": b""})

    async def _linger(self) -> None:
        # Closing while the client still sends would reset the connection and lose the answer on its way.
        with move_on_after(LINGER_S):
            while not self._complete and self._size <= 4 * self._max_bytes:
                message = await self._receive()
                self._size += len(message.get("body", b""))
                self._complete = not message.get("more_body", False)


def _closing(status: int, code: str, message: str) -> ApiError:
    return ApiError(status, code, message, headers={"Connection": "close", **NO_RETRY})
