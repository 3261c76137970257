"""A server for the bench's client: scripted chats over a real socket, and a token counter like the engine's."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import anyio
from anyio.abc import SocketAttribute, SocketStream

from bench.client import Address
from bench.servers import Server

Handler = Callable[[SocketStream], Awaitable[None]]


@asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[Address]:
    """Hand every connection on a free port of the loopback interface to `handler`."""
    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener, anyio.create_task_group() as group:
        group.start_soon(listener.serve, handler)
        yield Address("127.0.0.1", listener.extra_attributes[SocketAttribute.local_port]())
        group.cancel_scope.cancel()


def plain(body: bytes) -> bytes:
    """A whole reply with a known length."""
    return f"HTTP/1.1 200 OK\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body


HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"


def frame(text: str) -> bytes:
    """One chunk of a chunked body that carries one event."""
    data = f"data: {text}\n\n".encode()
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


@dataclass(slots=True)
class FakeServer:
    """Answers chats with `reply(body)`; a list is streamed, one event per item, `pause_s` apart.

    A chunk of a stream costs one token, a plain reply what its usage says; `generated` is served as the metric.
    """

    reply: Callable[[dict[str, Any]], dict[str, Any] | list[dict[str, Any]]]
    pause_s: float = 0.0
    generated: int = 0
    asked: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    hung_up: int = 0

    async def handle(self, stream: SocketStream) -> None:
        """Serve one connection."""
        async with stream:
            head, body = (await stream.receive()).split(b"\r\n\r\n", 1)
            if head.startswith(b"GET /metrics"):
                await stream.send(plain(self._metrics()))
                return
            self.asked.append(json.loads(body))
            reply = self.reply(self.asked[-1])
            if isinstance(reply, dict):
                self.generated += reply["usage"]["completion_tokens"]
                await stream.send(plain(json.dumps(reply).encode()))
            else:
                await self._stream(stream, reply)

    async def _stream(self, stream: SocketStream, chunks: list[dict[str, Any]]) -> None:
        try:
            await stream.send(HEAD)
            for chunk in chunks:
                self.generated += 1
                await stream.send(frame(json.dumps(chunk)))
                await anyio.sleep(self.pause_s)
            await stream.send(frame("[DONE]") + END)
        except anyio.BrokenResourceError:
            self.hung_up += 1

    def _metrics(self) -> bytes:
        labels = 'engine="0"'
        lines = [f"vllm:generation_tokens_total{{{labels}}} {self.generated}.0"]
        lines += [f"vllm:num_requests_{state}{{{labels}}} 0.0" for state in ("running", "waiting")]
        return "\n".join(lines).encode()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Server]:
        """The fake as the bench sees a started server."""
        async with serving(self.handle) as address:
            yield Server(address, "fake", 0.1)


def chat(content: str, reasoning: str = "hm", tokens: int = 10, **usage: object) -> dict[str, Any]:
    """A plain chat completion."""
    message = {"role": "assistant", "content": content, "reasoning": reasoning}
    counts = {"completion_tokens": tokens, "completion_tokens_details": {"reasoning_tokens": tokens - 2}}
    return {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}], "usage": counts | usage}
