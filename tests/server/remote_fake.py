"""A server that speaks vLLM's wire over real sockets, for the remote adapter: scripted tokens, and faults on demand.

Its tokenizer is ScriptedEngine's unless `encode` says otherwise. Before a route is served `fault` may take the
connection over; what it returns true for is not served. Requests are kept in `asked`.
"""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from ssl import SSLContext
from struct import pack
from typing import Any

import anyio
from anyio.abc import ByteStream, SocketAttribute
from anyio.streams.tls import TLSListener

from thinkserve.strategies.engine import Tokens
from thinkserve.strategies.testing import SCRIPTED, ScriptedEngine

GONE = (anyio.BrokenResourceError, anyio.ClosedResourceError, anyio.EndOfStream)
_TEXT = ScriptedEngine([])


@dataclass(frozen=True, slots=True)
class Asked:
    """A request as it arrived."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: Any


Fault = Callable[[Asked, ByteStream], Awaitable[bool]]


async def no_fault(asked: Asked, stream: ByteStream) -> bool:
    return False


def card(name: str = "big", context: int | None = 1000, **more: object) -> dict[str, object]:
    return {"id": name, "object": "model", "owned_by": "vllm", "max_model_len": context, "parent": None, **more}


@dataclass
class FakeVllm:
    """Writes `script` for every job, a chunk per token and `pause_s` after each."""

    script: str | Sequence[int] = "one two<eos>"
    models: Sequence[Mapping[str, object]] = (card(),)
    encode: Callable[[str], Tokens] = _TEXT.encode
    fault: Fault = no_fault
    pause_s: float = 0.0
    budgets: bool = True
    labels: int = 2
    switch: bool = True
    asked: list[Asked] = field(default_factory=list[Asked])
    connections: int = 0
    hung_up: int = 0

    @asynccontextmanager
    async def running(self, tls: SSLContext | None = None) -> AsyncIterator[str]:
        """Its address, while it runs."""
        listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
        scheme, port = "https" if tls else "http", listener.extra_attributes[SocketAttribute.local_port]()
        async with listener, anyio.create_task_group() as group:
            serving = listener if tls is None else TLSListener(listener, tls, standard_compatible=False)
            group.start_soon(serving.serve, self.handle)
            yield f"{scheme}://127.0.0.1:{port}"
            group.cancel_scope.cancel()

    def bodies(self, path: str) -> list[Any]:
        """What was posted to a path."""
        return [asked.body for asked in self.asked if asked.path == path]

    async def handle(self, stream: ByteStream) -> None:
        """Serve one connection, request after request."""
        self.connections += 1
        async with stream:
            with suppress(*GONE):
                while (asked := await _request(stream)) is not None:
                    self.asked.append(asked)
                    if await self.fault(asked, stream):
                        return
                    await self._serve(asked, stream)

    async def _serve(self, asked: Asked, stream: ByteStream) -> None:
        match asked.path:
            case "/health":
                await stream.send(reply(b""))
            case "/v1/models":
                await stream.send(told({"object": "list", "data": list(self.models)}))
            case "/tokenize":
                tokens = self._tokenized(asked.body)
                await stream.send(told({"count": len(tokens), "max_model_len": 1000, "tokens": tokens}))
            case "/detokenize":
                await stream.send(told({"prompt": f"<{asked.body['tokens'][0]}>"}))
            case "/v1/completions":
                await self._complete(asked.body, stream)
            case "/pooling":
                data = [{"index": at, "object": "pooling", "data": self._logits(ids)} for at, ids in
                        enumerate(asked.body["input"])]  # fmt: skip
                await stream.send(told({"object": "list", "data": data, "usage": {}}))
            case _:
                await stream.send(told({"error": {"message": "Not Found", "type": "NotFound", "code": 404}}, 404))

    def _tokenized(self, body: Any) -> list[int]:
        if "prompt" in body:
            return list(self.encode(body["prompt"]))
        lines = "".join(f"{each['role']}: {each['content']}\n" for each in body["messages"]) + "<think>\n"
        closed = self.switch and body["chat_template_kwargs"].get("enable_thinking") is False
        return list(self.encode(lines + ("\n</think>\n\n" if closed else "")))

    def _logits(self, ids: Sequence[int]) -> str:
        """Of token t at place p: the labels' logits p, t, 0, 0, ..."""
        rows = [([float(at), float(token)] + [0.0] * self.labels)[: self.labels] for at, token in enumerate(ids)]
        return b64encode(b"".join(pack(f"<{self.labels}f", *row) for row in rows)).decode()

    async def _complete(self, body: Any, stream: ByteStream) -> None:
        budget = body.get("thinking_token_budget")
        if budget is not None and not self.budgets:
            message = "thinking_token_budget is set but reasoning_config is not configured."
            refusal = json.dumps({"error": {"message": message, "type": "BadRequestError", "code": 400}})
            await stream.send(STREAM + framed(f"data: {refusal}\n\n") + framed("data: [DONE]\n\n") + END)
            return
        script = self.encode(self.script) if isinstance(self.script, str) else tuple(self.script)
        if budget == 0:
            script = SCRIPTED.think_close + script
        async with anyio.create_task_group() as group:
            group.start_soon(self._watch, stream, group.cancel_scope)
            await stream.send(STREAM)
            for line in self.lines(body, script):
                await stream.send(framed(f"data: {line}\n\n"))
                await anyio.sleep(self.pause_s)
            await stream.send(END)
            group.cancel_scope.cancel()

    async def _watch(self, stream: ByteStream, scope: anyio.CancelScope) -> None:
        """A client that goes away while it is written to."""
        with suppress(*GONE):
            await stream.receive()
        self.hung_up += 1
        scope.cancel()

    def lines(self, body: dict[str, Any], script: Tokens) -> list[str]:
        """The data of a stream, as vLLM 0.32 writes it: chunks, a chunk of usage, [DONE]."""
        tokens = script[: body["max_tokens"]]
        lines = [self._chunk(body, tokens, at) for at in range(len(tokens))]
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": len(tokens)}
        last = {"id": "cmpl-1", "choices": [], "usage": usage | {"prompt_tokens_details": {"cached_tokens": 3}}}
        return [*lines, json.dumps(last), "[DONE]"]

    def _chunk(self, body: dict[str, Any], tokens: Tokens, at: int) -> str:
        ended = "stop" if tokens[at] in SCRIPTED.eos else "length" if at + 1 == body["max_tokens"] else None
        choice = {
            "index": 0,
            "text": _TEXT.decode(tokens[at : at + 1]),
            "logprobs": _logprobs(tokens[at], body["logprobs"]) if "logprobs" in body else None,
            "finish_reason": ended,
            "stop_reason": None,
            "prompt_token_ids": body["prompt"] if at == 0 else None,
            "token_ids": [tokens[at]],
        }
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": at + 1, "total_tokens": 0}
        return json.dumps({"id": "cmpl-1", "object": "text_completion", "choices": [choice], "usage": usage})


def _logprobs(token: int, count: int) -> dict[str, Any]:
    """The sampled token first, then the best: here 7, 8, ... with -1, -2, ...; an even token is none of them."""
    best = {f"token_id:{7 + at}": -1.0 - at for at in range(count)}
    if token % 2:
        best.pop(f"token_id:{6 + count}", None)
        return {"token_logprobs": [-1.5], "tokens": [], "top_logprobs": [{f"token_id:{token}": -1.5} | best]}
    return {"token_logprobs": [-9999.0], "tokens": [], "top_logprobs": [{f"token_id:{token}": -9999.0} | best]}


STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"


def framed(text: str | bytes) -> bytes:
    """One chunk of a chunked body."""
    data = text.encode() if isinstance(text, str) else text
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def reply(body: bytes, status: int = 200, **headers: str) -> bytes:
    """A whole reply; `_` in a header's name stands for `-`."""
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 {status} X\r\n{lines}content-length: {len(body)}\r\n\r\n".encode() + body


def told(content: object, status: int = 200, **headers: str) -> bytes:
    """A reply of JSON."""
    return reply(json.dumps(content).encode(), status, content_type="application/json", **headers)


async def _request(stream: ByteStream) -> Asked | None:
    content = b""
    while b"\r\n\r\n" not in content:
        content += await stream.receive()
    head, body = content.split(b"\r\n\r\n", 1)
    first, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    while len(body) < int(headers.get("content-length", "0")):
        body += await stream.receive()
    method, path, _ = first.split(" ")
    return Asked(method, path, headers, json.loads(body) if body else None)
