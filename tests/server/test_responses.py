"""The responses without uvicorn: what they send, and how they learn in ASGI's other ways that a client has left."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint
from starlette.types import Message, Scope

from thinkserve.server.app import create_app
from thinkserve.server.responses import compact, encoded
from thinkserve.server.settings import Settings
from thinkserve.server.sse import EventWriter, Template, comment, data
from thinkserve.server.testing import ScriptedBackend
from thinkserve.server.text_out import SLICE
from thinkserve.server.wire_types import Completion, TokenLogprob
from thinkserve.strategies import registry
from thinkserve.strategies.engine import Answer, Delta, Emit, Engine, Task
from thinkserve.strategies.errors import EngineFailed
from thinkserve.strategies.scripted import ScriptedStream
from thinkserve.strategies.testing import SCRIPTED, ScriptedEngine

pytestmark = pytest.mark.anyio


class Client:
    """An ASGI client that leaves when told to, in the way of ASGI 2.4: the server only says so in `send`."""

    def __init__(
        self, engine: ScriptedEngine, *, stream: bool, fields: Mapping[str, Any] = {}, **settings: Any
    ) -> None:
        self.app = create_app(Settings(served_name="m", **settings), ScriptedBackend(engine))
        body = {"model": "m", "stream": stream, "messages": [{"role": "user", "content": "x"}], **fields}
        self._body: list[Message] = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]
        self.sent: list[Message] = []
        self.leaves_after: int | None = None
        self.left = anyio.Event()

    async def receive(self) -> Message:
        if self._body:
            return self._body.pop()
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if self.leaves_after is not None and len(self.sent) >= self.leaves_after:
            raise OSError("gone")
        self.sent.append(message)

    async def chat(self) -> bytes:
        scope: Scope = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.4"}, "http_version": "1.1", "method": "POST",
            "scheme": "http", "path": "/v1/chat/completions", "raw_path": b"/v1/chat/completions", "query_string": b"",
            "root_path": "", "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
        }  # fmt: skip
        await self.app(scope, self.receive, self.send)
        return b"".join(message.get("body", b"") for message in self.sent)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_silent_request_ends_when_receive_reports_the_disconnect(stream: bool) -> None:
    """The listener is ours, whatever the ASGI version promises."""
    engine = ScriptedEngine(["t"], tick=3600)
    client = Client(engine, stream=stream)
    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            group.start_soon(client.chat)
            while not engine.live:
                await anyio.sleep(0.01)
            client.left.set()
    assert engine.live == []


async def test_how_long_it_took_is_told_in_the_header() -> None:
    """To the first token and to the decision, in milliseconds; a stream begins before these are known."""
    whole, streamed = (Client(ScriptedEngine(["t</think>a"]), stream=stream) for stream in (False, True))
    for client in (whole, streamed):
        await client.chat()
    found = [dict(client.sent[0]["headers"]).get(b"server-timing") for client in (whole, streamed)]

    assert found[1] is None
    times = re.fullmatch(rb"ttft;dur=(\d+\.\d), decide;dur=(\d+\.\d)", found[0] or b"")
    assert times is not None
    assert 0 <= float(times[1]) <= float(times[2])


@pytest.mark.parametrize("after", range(1, 8))
async def test_a_send_that_fails_ends_the_request(after: int) -> None:
    """At every chunk; nothing is live afterwards and nothing is raised."""
    engine = ScriptedEngine(["tt</think>aaaa"])
    client = Client(engine, stream=True)
    client.leaves_after = after
    with anyio.fail_after(5):
        await client.chat()
    assert engine.live == []
    assert len(client.sent) == after


@pytest.mark.parametrize(
    ("error", "code"),
    [(TimeoutError(), b"deadline_exceeded"), (BrokenPipeError("a worker has gone"), b"internal_error")],
)
async def test_an_error_that_is_not_of_the_client_is_told_in_the_stream(
    monkeypatch: pytest.MonkeyPatch, error: OSError, code: bytes
) -> None:
    """Though both are OSErrors, as what a server raises for a client that has gone."""

    async def run(task: Task, engine: Engine, emit: Emit, options: Any) -> Answer:
        raise error

    failing = replace(registry.get("single"), run=run)
    monkeypatch.setattr(registry, "get", lambda name: failing)
    answer = await Client(ScriptedEngine([]), stream=True).chat()
    assert code in answer
    assert answer.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("stream", [False, True])
async def test_what_the_engine_said_is_for_the_log(stream: bool, caplog: pytest.LogCaptureFixture) -> None:
    """The client gets the request's id, under which the operator finds the reason."""
    failed = EngineFailed("The remote guide does not accept our key (401).")
    answer = await Client(ScriptedEngine(["t"], fail={0: (0, failed)}), stream=stream).chat()
    (line,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert str(failed) in line
    assert str(failed).encode() not in answer
    assert line.split()[1].encode() in answer


async def test_a_client_that_does_not_take_the_keep_alive_is_given_up() -> None:
    """The watch over a silent stream does not wait for its own comment."""

    class Stalled(Client):
        async def send(self, message: Message) -> None:
            if message.get("body", b"").startswith(b": "):
                await anyio.sleep_forever()
            await super().send(message)

    engine = ScriptedEngine(["t"], tick=3600)
    client = Stalled(engine, stream=True, keep_alive_s=0.05)
    client.app.state.server.send_timeout_s = 0.2
    with anyio.fail_after(5):
        await client.chat()
    assert engine.live == []


async def test_not_a_number_never_gets_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """JSON has no NaN: the client gets an error, not a broken document."""

    async def poisoned(self: ScriptedStream) -> Delta:
        delta = await genuine(self)
        return Delta(delta.tokens, (float("nan"),) * len(delta.tokens), (), delta.finish)

    genuine = ScriptedStream.__anext__
    monkeypatch.setattr(ScriptedStream, "__anext__", poisoned)
    for stream in (False, True):
        answer = await Client(ScriptedEngine(["</think>a"]), stream=stream, fields={"logprobs": True}).chat()
        assert b"NaN" not in answer
        assert b"internal_error" in answer


LOGPROBS: dict[str, Any] = {"logprobs": True, "top_logprobs": 3}


def streamed(answer: bytes) -> list[tuple[str, list[TokenLogprob]]]:
    """Content and log-probabilities of each chunk that has some."""
    lines = [line.removeprefix("data: ") for line in answer.decode().split("\n\n") if line.startswith("data: {")]
    choices = [choice for line in lines for choice in json.loads(line)["choices"]]
    return [(each["delta"]["content"], each["logprobs"]["content"]) for each in choices if each["logprobs"]]


async def test_a_winners_log_probabilities_come_in_slices() -> None:
    """A race commits its answer at once; it is sent in chunks of some tokens, and no token's entry is lost."""
    text = "abcdefgh é€ " * 40
    race = LOGPROBS | {"strategy": {"name": "short-m-at-k", "params": {"k": 2, "m": 1}}, "seed": 1}
    plain = await Client(ScriptedEngine(["t</think>" + text]), stream=False, fields=race).chat()
    stream = await Client(ScriptedEngine(["t</think>" + text]), stream=True, fields=race).chat()
    (choice,) = json.loads(plain)["choices"]
    chunks = streamed(stream)
    assert choice["message"]["content"] == "".join(content for content, _ in chunks) == text
    assert len(choice["logprobs"]["content"]) == len(text.encode())
    assert [entry for _, entries in chunks for entry in entries] == choice["logprobs"]["content"]
    assert max(len(entries) for _, entries in chunks) <= SLICE + 3  # with what an unfinished character held back


async def test_tokens_at_the_end_without_text_keep_their_log_probabilities() -> None:
    """In a stream as in the plain answer."""
    script, info = (*ScriptedEngine([]).encode("t</think>ab"), 1), replace(SCRIPTED, think_open=())
    plain = await Client(ScriptedEngine([script], info=info), stream=False, fields=LOGPROBS).chat()
    stream = await Client(ScriptedEngine([script], info=info), stream=True, fields=LOGPROBS).chat()
    entries = json.loads(plain)["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in entries] == ["a", "b", ""]
    assert [entry for _, each in streamed(stream) for entry in each] == entries


async def test_a_large_body_is_encoded_in_slices() -> None:
    """The same bytes, with turns for others in between; not even a text that looks like the place is taken for it."""
    plain = await Client(ScriptedEngine(['t</think>"logprobs":{"content":[']), stream=False, fields=LOGPROBS).chat()
    completion: Completion = json.loads(plain)
    entries = completion["choices"][0]["logprobs"] or {"content": [], "refusal": None}
    entries["content"] *= 20
    expected, turns = compact(completion), 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await checkpoint()

    async with anyio.create_task_group() as group:
        group.start_soon(count)
        body = await encoded(completion)
        group.cancel_scope.cancel()
    assert body == expected
    assert turns >= len(entries["content"]) // SLICE > 5


def test_blocks_are_lines_that_clients_understand() -> None:
    """Line breaks of every kind stay inside the JSON; a template is the block it stands for."""
    awkward = 'a\nb\r\u2028\u0085"\\ \U0001f389 \x00'
    assert data({"x": awkward}).count(b"\n") == 2
    assert json.loads(data({"x": awkward}).removeprefix(b"data: ")) == {"x": awkward}
    template = Template({"a": "\ue000text\ue001", "b": ["\ue000text\ue001"]})
    assert template.fill(awkward) == data({"a": awkward, "b": [awkward]})
    assert comment("still here") == b": still here\n\n"
    with pytest.raises(ValueError, match="not JSON compliant"):
        data(float("nan"))


class Gate:
    """A client that takes what is sent only while open."""

    def __init__(self) -> None:
        self.open = anyio.Event()
        self.bodies: list[bytes] = []

    async def send(self, message: Message) -> None:
        await self.open.wait()
        self.bodies.append(message["body"])


async def test_what_waits_for_a_slow_client_goes_out_together_and_in_order() -> None:
    """One send for all of it; writers are not held up by a few blocks."""
    gate = Gate()
    writer = EventWriter(gate.send)
    async with anyio.create_task_group() as group:
        group.start_soon(writer.write, b"0")
        await anyio.sleep(0.01)
        assert writer.busy
        assert writer.stuck > 0
        for number in range(1, 10):
            with anyio.fail_after(1):
                await writer.write(str(number).encode())
        gate.open.set()
    await writer.end()
    assert gate.bodies == [b"0", b"123456789", b"data: [DONE]\n\n"]


async def test_a_writer_is_held_up_when_too_much_waits() -> None:
    """Back-pressure: the buffer of a client that takes nothing is bounded."""
    gate = Gate()
    writer = EventWriter(gate.send)
    written = 0

    async def write_all(put: Callable[[bytes], Any]) -> None:
        nonlocal written
        for _ in range(1000):
            await put(b"x")
            written += 1

    async with anyio.create_task_group() as group:
        group.start_soon(writer.write, b"x")
        await anyio.sleep(0.01)
        group.start_soon(write_all, writer.write)
        await anyio.sleep(0.01)
        assert written < 100
        gate.open.set()
    await writer.end()
    assert b"".join(gate.bodies) == b"x" * 1001 + b"data: [DONE]\n\n"


async def test_a_writer_that_is_cancelled_while_it_waits_loses_nothing() -> None:
    """Its block, and those of others that it was sending, go out with the next."""
    gate = Gate()
    writer = EventWriter(gate.send)
    with anyio.move_on_after(0.02):
        await writer.write(b"a")
    assert not writer.busy
    gate.open.set()
    await writer.write(b"b")
    await writer.end()
    assert b"".join(gate.bodies) == b"abdata: [DONE]\n\n"
