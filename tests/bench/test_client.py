"""The measuring client: bytes in any portions, real sockets, and a stream that is closed before its end."""

from __future__ import annotations

import json

import anyio
import pytest
from anyio.abc import SocketStream

from bench.client import BadReply, BodyReader, SseReader, encode, get, opened, post
from tests.bench.fakes import HEAD, frame, serving

EVENTS = b': hello\n\ndata: {"a": 1}\n\nevent: x\nid: 7\ndata: {"b":\ndata: 2}\n\n: keep-alive\n\ndata: [DONE]\n\n'
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nWiki\r\n6;x=y\r\npedia \r\n0\r\n\r\n"
PLAIN = b"HTTP/1.1 404 Not Found\r\ncontent-length: 4\r\n\r\nnope"

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("ends", [b"\n", b"\r\n"])
def test_events_are_the_same_however_they_are_cut(size: int, ends: bytes) -> None:
    """Portions of any size and both line ends give the data of each event; comments and names give nothing."""
    reader, data = SseReader(), EVENTS.replace(b"\n", ends)

    found = [one for start in range(0, len(data), size) for one in reader.push(data[start : start + size])]

    assert found == [b'{"a": 1}', b'{"b":\n2}', b"[DONE]"]


@pytest.mark.parametrize("size", [1, 2, 5, 1000])
@pytest.mark.parametrize(("data", "status", "body"), [(CHUNKED, 200, b"Wikipedia "), (PLAIN, 404, b"nope")])
def test_bodies_are_the_same_however_they_are_cut(size: int, data: bytes, status: int, body: bytes) -> None:
    """Chunked and plain bodies are put together from portions of any size, and their end is noticed."""
    reader = BodyReader()

    found = b"".join(reader.push(data[start : start + size]) for start in range(0, len(data), size))

    assert (body, status, True) == (found, reader.status, reader.done)


def test_a_body_without_content_is_complete_with_its_head() -> None:
    """A reply of no bytes does not wait for more."""
    reader = BodyReader()

    assert reader.push(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n") == b""
    assert reader.done


async def test_a_post_carries_its_body_and_returns_the_reply() -> None:
    """The server reads what was sent; the client's clock runs from first to last byte."""
    seen = list[bytes]()

    async def handler(stream: SocketStream) -> None:
        async with stream:
            seen.append(await stream.receive())
            await stream.send(b'HTTP/1.1 200 OK\r\ncontent-length: 8\r\n\r\n{"x":')
            await anyio.sleep(0.05)
            await stream.send(b" 1}")

    async with serving(handler) as address:
        reply = await post(address, "/v1", {"question": "?"})

    assert reply.json() == {"x": 1}
    assert json.loads(seen[0].split(b"\r\n\r\n")[1]) == {"question": "?"}
    assert 0 < reply.first_s <= reply.last_s - 0.04


async def test_leaving_the_block_closes_the_stream() -> None:
    """A client that has seen enough hangs up: the server's next read sees the end, its endless stream stops."""
    hung_up, sent = anyio.Event(), 0

    async def handler(stream: SocketStream) -> None:
        nonlocal sent
        async with stream:
            await stream.receive()
            await stream.send(HEAD)
            try:
                while True:
                    await stream.send(frame(json.dumps({"number": sent})))
                    sent += 1
                    await anyio.sleep(0.01)
            except (anyio.BrokenResourceError, anyio.ClosedResourceError):
                hung_up.set()

    async with serving(handler) as address:
        found = []
        async with opened(address, encode("POST", "/", {})) as chunks:
            async for chunk in chunks:
                found.append(chunk["number"])
                if len(found) == 3:
                    break
        with anyio.fail_after(2):
            await hung_up.wait()

    assert found == [0, 1, 2]


async def test_an_error_inside_a_stream_is_raised() -> None:
    """`data: {"error": ...}` is no chunk."""

    async def handler(stream: SocketStream) -> None:
        async with stream:
            await stream.receive()
            await stream.send(HEAD + frame('{"error": {"message": "gone"}}'))

    async with serving(handler) as address, opened(address, encode("POST", "/", {})) as chunks:
        with pytest.raises(BadReply, match="gone"):
            await anext(chunks)


@pytest.mark.parametrize("part", [b"", b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf"])
async def test_a_connection_that_ends_too_early_is_an_error(part: bytes) -> None:
    """Half a reply is never taken for a whole one."""

    async def handler(stream: SocketStream) -> None:
        async with stream:
            await stream.receive()
            await stream.send(part)

    async with serving(handler) as address:
        with pytest.raises(BadReply, match="closed the connection"):
            await get(address, "/")


async def test_a_refusal_says_what_the_server_said() -> None:
    """An HTTP error turns up in the message."""

    async def handler(stream: SocketStream) -> None:
        async with stream:
            await stream.receive()
            await stream.send(PLAIN)

    async with serving(handler) as address:
        with pytest.raises(BadReply, match=r"404.*nope"):
            (await get(address, "/")).json()
