"""The two ways to answer a chat: one JSON document, or a stream of chunks. Both run the strategy inside `__call__`.

What can be known beforehand (is the engine alive, is there room) is checked before the first byte, so it has a status
of its own; what fails later in a stream becomes `data: {"error": ...}`. A client that leaves takes all chains with it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from time import monotonic

from anyio import CancelScope, create_task_group, sleep
from anyio.lowlevel import checkpoint
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from thinkserve.server import errors, wire_out
from thinkserve.server.asgi import refuse
from thinkserve.server.errors import ApiError, RoleDown
from thinkserve.server.exchange import Exchange
from thinkserve.server.metrics import LeftIn
from thinkserve.server.needs import lost
from thinkserve.server.plan import Outcome, Plan, Usage
from thinkserve.server.protocol import ChatRequest
from thinkserve.server.runner import usable
from thinkserve.server.sse import MARK, EventWriter, Template, comment, data
from thinkserve.server.state import ServerState
from thinkserve.server.text_out import SLICE, TextOut
from thinkserve.server.wire_types import Completion
from thinkserve.strategies.engine import Event, Phase, Piece
from thinkserve.strategies.errors import EngineFailed, ReasoningError, Unforgiven

logger = logging.getLogger("thinkserve")

# Characters of a text in one event: escaped, and in two fields, they make a line that clients with a limit can read.
LONGEST = 4096
KNOWN = (ApiError, ReasoningError, TimeoutError)


class ChatResponse(Response):
    """What both have in common."""

    def __init__(self, plan: Plan, chat: ChatRequest, state: ServerState, headers: Mapping[str, str]) -> None:
        # As StreamingResponse does it: the base class would declare an empty body.
        self.status_code = 200
        self.background = None
        self.init_headers(headers)
        self.plan, self.chat, self.state = plan, chat, state

    async def enter(self, scope: Scope) -> AbstractContextManager[None]:
        """What this request may cost. Raises EngineFailed; entering it raises ApiError 503."""
        await self.state.backend.check()
        if gone := lost(self.plan.roles, self.state.backend):
            raise RoleDown(gone)
        self.execution = self.state.runner.open(self.plan, client(scope))
        self.text = TextOut(self.execution.texts, self.plan)
        return self.state.admission.charge(self.plan)

    async def _push(self, piece: Piece) -> None:
        for number, part in enumerate(self.text.slices(piece)):
            # Others have their turn between slices.
            if number:
                await checkpoint()
            await self._show(self.text.push(part))

    async def _show(self, texts: list[tuple[Phase, str]]) -> None:
        """Tell the client what is now certain; where all is told in the end, nothing."""

    def left(self, exchange: Exchange) -> bool:
        """Whether the client has gone; counted here."""
        if exchange.gone is None:
            return False
        phase: LeftIn = "answering" if self.text.reasoning or self.text.content else "waiting"
        self.state.metrics.disconnected(phase, monotonic() - exchange.gone)
        return True

    def unanswered(self) -> ApiError:
        """There is nothing to show: the deadline has passed, or the server had a reason of its own."""
        return self.execution.cause or errors.from_exception(TimeoutError(), self.plan.request_id)

    def told(self, error: Exception) -> ApiError:
        """What the client is told; the log has the engine's own words, and the traceback of what nobody foresaw."""
        if not isinstance(error, KNOWN):
            logger.error("request %s failed", self.plan.request_id, exc_info=error)
        elif isinstance(error, (EngineFailed, Unforgiven)):
            logger.error("request %s failed: %s", self.plan.request_id, error)
        return errors.from_exception(error, self.plan.request_id)


class ChatJson(ChatResponse):
    """The whole answer as one JSON document."""

    media_type = "application/json"

    def __init__(self, plan: Plan, chat: ChatRequest, state: ServerState) -> None:
        super().__init__(plan, chat, state, {})
        self._error: ApiError | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the strategy and send the completion; nothing is sent to a client that has left."""
        with await self.enter(scope):
            exchange = Exchange(receive)
            await exchange.run(self._work)
        if self.left(exchange):
            return
        if self._error is not None:
            # Answered here and not by the app, which counts what never got to work.
            await refuse(self._error, send)
            return
        self.headers["content-length"] = str(len(self._body))
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self._body})

    async def _work(self) -> None:
        try:
            outcome = await self.state.runner.run(self.execution, self._emit)
            if not usable(outcome):
                raise self.unanswered()
            self.text.flush()
            self.headers["server-timing"] = timing(outcome.usage)
            completion = wire_out.completion(self.plan, self.chat, outcome, self.text)
            self._body = await encoded(completion)
        except Exception as error:  # noqa: BLE001 - whatever it is, the client is told once the task group is closed
            self._error = self.told(error)

    async def _emit(self, item: Piece | Event) -> None:
        if isinstance(item, Piece):
            await self._push(item)


async def encoded(completion: Completion) -> bytes:
    """The body as JSON, long log-probabilities slice by slice. Raises ValueError for a number that JSON lacks."""
    (choice,) = completion["choices"]
    entries = choice["logprobs"]["content"] if choice["logprobs"] else []
    if len(entries) <= SLICE:
        return compact(completion)
    choice["logprobs"] = wire_out.logprobs([])
    # No text holds this: the quotation marks of texts are escaped.
    before, key, after = compact(completion).partition(b'"content":[')
    parts: list[bytes] = []
    for start in range(0, len(entries), SLICE):
        parts.append(compact(entries[start : start + SLICE])[1:-1])
        await checkpoint()
    return b"".join((before, key, b",".join(parts), after))


def compact(value: object) -> bytes:
    """JSON without spaces. Raises ValueError for a number that it lacks."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()


def timing(usage: Usage) -> str:
    """The `Server-Timing` header: milliseconds to the first token, and to the decision."""
    first = [] if usage.ttft_ms is None else [f"ttft;dur={usage.ttft_ms:.1f}"]
    return ", ".join([*first, f"decide;dur={usage.wall_ms:.1f}"])


class ChatStream(ChatResponse):
    """The answer as it comes, chunk by chunk."""

    media_type = "text/event-stream"

    def __init__(self, plan: Plan, chat: ChatRequest, state: ServerState) -> None:
        super().__init__(plan, chat, state, {"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        options = chat.stream_options
        self._progress = bool(options and options.include_progress)
        self._counts = bool(options and options.include_usage)
        self._seq = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the role at once, then run the strategy; the stream always ends with `[DONE]`."""
        with await self.enter(scope):
            self._chunks = chunks = wire_out.Chunks(self.plan, self.chat)
            self._templates = {
                "thinking": Template(chunks.reasoning(MARK)),
                "answer": Template(chunks.content(MARK)),
            }
            self._writer = EventWriter(send)
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            exchange = Exchange(receive)
            await exchange.run(self._work, self._keep_alive)
            self.left(exchange)

    async def _work(self) -> None:
        self._started = monotonic()
        # What is left to raise here is a send that fails: the client has gone, and the listener hears of it as well.
        with suppress(OSError):
            try:
                await self._writer.write(data(self._chunks.role()))
                await self._finish(await self.state.runner.run(self.execution, self._emit))
            except Exception as error:  # noqa: BLE001 - the status is sent; all that is left is an error event
                # Not told by its type: a deadline, and trouble with a process of ours, are OSErrors too.
                if self._writer.lost:
                    return
                await self._writer.write(data(errors.body(self.told(error))))
            await self._writer.end()

    async def _finish(self, outcome: Outcome) -> None:
        if not usable(outcome) and not (self.text.reasoning and self.plan.stream_mode != "none"):
            raise self.unanswered()
        blocks = [self._block(phase, text) for phase, text in self.text.flush()]
        if left := self.text.take_logprobs():
            # Of tokens at the end that have no text.
            blocks.append(data(self._chunks.content("", left)))
        blocks.append(data(self._chunks.finish(outcome, stopped=self.text.stopped is not None)))
        if self._counts:
            blocks.append(data(self._chunks.usage(outcome.usage)))
        await self._writer.write(b"".join(blocks))

    async def _emit(self, item: Piece | Event) -> None:
        if isinstance(item, Piece):
            await self._push(item)
            return
        if item.type == "leader":
            await self._show(self.text.anew())
        if self._progress:
            self._seq += 1
            t_ms = (monotonic() - self._started) * 1000
            await self._writer.write(data(self._chunks.progress(item, self._seq, t_ms)))

    async def _show(self, texts: list[tuple[Phase, str]]) -> None:
        for phase, text in texts:
            if block := self._block(phase, text):
                await self._writer.write(block)

    def _block(self, phase: str, text: str) -> bytes:
        if phase == "answer" and self.chat.logprobs:
            return data(self._chunks.content(text, self.text.take_logprobs()))
        if phase == "thinking" and self.plan.stream_mode == "none":
            return b""
        return b"".join(self._templates[phase].fill(text[at : at + LONGEST]) for at in range(0, len(text), LONGEST))

    async def _keep_alive(self, scope: CancelScope) -> None:
        """Comment on silence; return when the client has taken nothing for too long."""
        writer, silence, patience = self._writer, self.state.settings.keep_alive_s, self.state.send_timeout_s
        async with create_task_group() as group:
            while writer.stuck < patience and not writer.lost:
                due = writer.last + silence - monotonic()
                if writer.busy or due > 0:
                    await sleep(min(1.0 if writer.busy else due, patience / 4))
                else:
                    # Beside this watch, because the client may not take the comment either.
                    group.start_soon(self._comment)
                    await checkpoint()
            group.cancel_scope.cancel()

    async def _comment(self) -> None:
        with suppress(OSError):
            await self._writer.write(comment(f"keep-alive {self.execution.status()}"))


def client(scope: Scope) -> dict[str, object]:
    """What the log says about who asked."""
    state = scope.get("state", {})
    return {name: state[name] for name in ("client_id", "key_id") if state.get(name) is not None}
