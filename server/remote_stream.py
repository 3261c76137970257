"""One job on a remote vLLM server: entering sends it, iterating reads what arrives, leaving closes the connection.

vLLM aborts a job whose client has gone. `generated` counts what was seen here, by the ids and by the server's own
running usage; of a job that was left early it does not hold the tokens that were on their way, or that the server
sampled before it noticed: nobody here can know them, and none are invented. After a finish it is the server's count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from types import TracebackType
from typing import Final, Self

import anyio
import httpx

from thinkserve.server.remote_http import REFUSALS, RemoteHttp, shut
from thinkserve.server.remote_wire import Chunk, Malformed, Pairs
from thinkserve.strategies.engine import Delta, Finish
from thinkserve.strategies.errors import EngineFailed

PATH: Final = "/v1/completions"
# Once the finish is known, the usage and the end of the stream are waited for no longer than this.
_TAIL_S = 1.0
_FINISH: Final[dict[str, Finish]] = {"stop": "stop", "length": "length", "repetition": "repetition"}


class EventLines:
    """Bytes of an event stream -> the data of its lines. vLLM writes each event as one line; comments are dropped."""

    __slots__ = ("_limit", "_pending")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._pending = bytearray()

    def push(self, part: bytes) -> list[bytes]:
        """Data of the lines that this part completes. Raises Malformed for a line over the limit."""
        self._pending += part
        lines: list[bytearray] = []
        if b"\n" in part:
            *lines, self._pending = self._pending.split(b"\n")
        if max(len(line) for line in (*lines, self._pending)) > self._limit:
            raise Malformed(f"sent a line of more than {self._limit} bytes")
        return [bytes(line[5:].strip()) for line in lines if line.startswith(b"data:")]


class RemoteStream:
    """A job in the remote engine: an async context manager, and the stream of its deltas."""

    __slots__ = (
        "_body", "_done", "_error", "_finish", "_http", "_left", "_limit", "_lines", "_logprobs", "_parse", "_parts",
        "_received", "_response", "_seen", "_tokens", "_top", "_usage", "cached",
    )  # fmt: skip

    def __init__(
        self, http: RemoteHttp, body: Mapping[str, object], limit: int, parse: Callable[[bytes], Chunk]
    ) -> None:
        self._http = http
        self._body = body
        self._limit = limit
        self._parse = parse
        self._lines = EventLines(http.settings.max_line_bytes)
        self._received = self._seen = self._usage = self.cached = 0
        self._done = self._left = False
        self._finish: str | None = None
        self._error: EngineFailed | None = None
        self._tokens: list[int] = []
        self._logprobs: list[float] = []
        self._top: list[Pairs] = []

    @property
    def generated(self) -> int:
        """Tokens that have arrived; once the stream has finished, what the server says it sampled."""
        return max(self._seen, self._usage)

    async def __aenter__(self) -> Self:
        self._response: httpx.Response = await self._http.send("POST", PATH, self._body)
        self._parts = self._response.aiter_raw()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left = True
        # Whoever reads it may have failed at its words: then it was of no use.
        if self._seen and self._error is None and not isinstance(error, EngineFailed):
            self._http.breaker.succeeded()
        await shut(self._response)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delta:
        if self._left:
            raise StopAsyncIteration
        while not self._tokens and self._finish is None:
            if self._error is not None:
                raise self._error
            try:
                await self._read()
            except EngineFailed as error:
                # What came with it is given first.
                self._error = error
        if self._finish is not None:
            return await self._last(self._finish)
        return self._delta(None)

    def unread(self) -> Delta:
        """What has arrived and was not read, its end as well."""
        return self._delta(_FINISH.get(self._finish or ""))

    async def _last(self, finish: str) -> Delta:
        """The last delta, once the server has said what the job cost; a stream cut off after its finish is whole."""
        self._left = True
        if finish not in _FINISH:
            self._error = self._http.broken(f"gave up on the request ({self._http.told(finish)})")
            raise self._error
        with anyio.move_on_after(_TAIL_S), suppress(EngineFailed):
            while not self._done:
                await self._read()
        return self._delta(_FINISH[finish])

    def _delta(self, finish: Finish | None) -> Delta:
        delta = Delta(tuple(self._tokens), tuple(self._logprobs), tuple(self._top), finish)
        self._tokens.clear()
        self._logprobs.clear()
        self._top.clear()
        return delta

    async def _read(self) -> None:
        """Take in what arrives next."""
        with self._http.reading():
            part = await anext(self._parts, None)
        if part is None:
            self._done = True
            if self._finish is None:
                raise self._http.broken("ended a stream before its end")
            return
        self._received += len(part)
        if self._received > self._http.settings.max_stream_bytes:
            raise self._http.broken(f"sent more than {self._http.settings.max_stream_bytes} bytes")
        try:
            for data in self._lines.push(part):
                # After it comes the end of the response, without which the connection could not be used again.
                if data != b"[DONE]":
                    self._take(self._parse(data))
        except Malformed as error:
            raise self._http.broken(str(error)) from error

    def _take(self, chunk: Chunk) -> None:
        if chunk.error is not None and chunk.code in REFUSALS:
            raise self._http.refused(chunk.code, chunk.error)
        if chunk.error is not None:
            raise self._http.broken(f"failed: {self._http.told(chunk.error)}")
        if self._finish is not None and chunk.tokens:
            raise Malformed("goes on after the end")
        if max(self._seen + len(chunk.tokens), chunk.generated) > self._limit:
            raise Malformed("writes more tokens than it was asked for")
        self._tokens += chunk.tokens
        self._logprobs += chunk.logprobs
        self._top += chunk.top
        self._seen += len(chunk.tokens)
        self._usage = max(self._usage, chunk.generated)
        self.cached = self.cached if chunk.cached is None else chunk.cached
        self._finish = self._finish or chunk.finish
