"""A lean HTTP/1.1 client for measuring: one connection per request, nothing parsed that the clock need not wait for.

The load generator shares two cores with the server it measures, so it must cost next to nothing and the same for
every server. It is no general client: no TLS, no redirects, no compression, no keep-alive.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import anyio
from anyio.abc import SocketStream

TIMEOUT_S = 900.0


class BadReply(Exception):
    """The server answered something that is no success, or not HTTP as we know it."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server listens."""

    host: str
    port: int


@dataclass(frozen=True, slots=True)
class Reply:
    """A complete body, and when it came: seconds from before the connect to the first and the last byte of it."""

    status: int
    body: bytes
    first_s: float
    last_s: float

    def json(self) -> dict[str, Any]:
        """The body as an object. Raises BadReply when the status is not 200."""
        if self.status != 200:
            raise BadReply(f"HTTP {self.status}: {self.body[:500]!r}")
        parsed: dict[str, Any] = json.loads(self.body)
        return parsed

    def events(self) -> list[dict[str, Any]]:
        """The body as the data objects of a finished event stream. Raises BadReply on errors or a missing end."""
        if self.status != 200:
            raise BadReply(f"HTTP {self.status}: {self.body[:500]!r}")
        data = SseReader().push(self.body)
        if not data or data[-1] != b"[DONE]":
            raise BadReply("the stream ended without [DONE]")
        return [checked(json.loads(one)) for one in data[:-1]]


def checked(chunk: dict[str, Any]) -> dict[str, Any]:
    """The chunk itself. Raises BadReply when it is an error sent inside a stream."""
    if "error" in chunk:
        raise BadReply(f"error in the stream: {chunk['error']}")
    return chunk


@dataclass(slots=True)
class BodyReader:
    """Bytes off the wire -> bytes of the body: reads the head, undoes chunked transfer. `done` once it is complete."""

    status: int = 0
    done: bool = False
    _pending: bytearray = field(default_factory=bytearray)
    _left: int = 0  # bytes until the end of the body or of the chunk
    _chunked: bool = False

    def push(self, data: bytes) -> bytes:
        """Take what arrived; return the part of the body that it completes."""
        self._pending += data
        if not self.status and not self._head():
            return b""
        return self._chunks() if self._chunked else self._plain()

    def _head(self) -> bool:
        end = self._pending.find(b"\r\n\r\n")
        if end < 0:
            return False
        first, *lines = bytes(self._pending[:end]).split(b"\r\n")
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines)}
        self.status = int(first.split(b" ", 2)[1])
        self._chunked = headers.get(b"transfer-encoding", b"").lower() == b"chunked"
        self._left = int(headers.get(b"content-length", b"0"))
        del self._pending[: end + 4]
        return True

    def _plain(self) -> bytes:
        part = bytes(self._pending[: self._left])
        self._left -= len(part)
        self._pending.clear()
        self.done = self._left == 0
        return part

    def _chunks(self) -> bytes:
        body = bytearray()
        while True:
            size_end = self._pending.find(b"\r\n")
            if size_end < 0:
                break
            size = int(bytes(self._pending[:size_end]).split(b";")[0], 16)
            end = size_end + 2 + size
            if len(self._pending) < end + 2:
                break
            body += self._pending[size_end + 2 : end]
            del self._pending[: end + 2]
            if size == 0:
                self.done = True
                break
        return bytes(body)


@dataclass(slots=True)
class SseReader:
    """Bytes of an event stream -> the `data` of each complete event; comments and other fields are passed over."""

    _pending: bytes = b""

    def push(self, data: bytes) -> list[bytes]:
        """Take the next part of the body; return the data of the events that it completes."""
        *events, self._pending = (self._pending + data).replace(b"\r\n", b"\n").split(b"\n\n")
        return [text for event in events if (text := _data(event))]


def _data(event: bytes) -> bytes:
    lines = [line[5:].removeprefix(b" ") for line in event.split(b"\n") if line.startswith(b"data:")]
    return b"\n".join(lines)


def encode(method: str, path: str, body: Mapping[str, object] | None = None) -> bytes:
    """A whole request as bytes, built before the clock starts."""
    content = json.dumps(body).encode() if body is not None else b""
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(content)}\r\n"
    return f"{head}Content-Type: application/json\r\n\r\n".encode() + content


async def send(address: Address, request: bytes) -> Reply:
    """Send the request and read the reply to its end. Raises BadReply when the connection ends before it."""
    start, first, body, reader = perf_counter(), 0.0, bytearray(), BodyReader()
    with anyio.fail_after(TIMEOUT_S):
        async with await anyio.connect_tcp(address.host, address.port) as stream:
            await stream.send(request)
            while not reader.done:
                part = reader.push(await _receive(stream))
                if part and not first:
                    first = perf_counter() - start
                body += part
    return Reply(reader.status, bytes(body), first, perf_counter() - start)


async def post(address: Address, path: str, body: Mapping[str, object]) -> Reply:
    """POST a JSON body."""
    return await send(address, encode("POST", path, body))


async def get(address: Address, path: str) -> Reply:
    """GET a path."""
    return await send(address, encode("GET", path))


@asynccontextmanager
async def opened(address: Address, request: bytes) -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
    """The chunks of an event stream as they arrive; leaving the block closes the socket."""
    async with await anyio.connect_tcp(address.host, address.port) as stream:
        await stream.send(request)
        async with aclosing(_chunks(stream)) as chunks:
            yield chunks


async def _chunks(stream: SocketStream) -> AsyncGenerator[dict[str, Any], None]:
    body, events = BodyReader(), SseReader()
    while not body.done:
        part = body.push(await _receive(stream))
        if body.status not in (0, 200):
            raise BadReply(f"HTTP {body.status}: {part[:500]!r}")
        for data in events.push(part):
            if data == b"[DONE]":
                return
            yield checked(json.loads(data))


async def _receive(stream: SocketStream) -> bytes:
    try:
        return await stream.receive(65536)
    except anyio.EndOfStream:
        raise BadReply("the server closed the connection in the middle of a reply") from None
