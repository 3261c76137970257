"""A chat whose prompt waits to be rendered is at work: it takes a place, and its deadline and its client count."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from time import monotonic
from typing import Any

import anyio
import anyio.to_thread
import httpx
import pytest

from thinkserve.server.plan import Rendered
from thinkserve.server.testing import ScriptedBackend
from thinkserve.strategies.errors import BadOptions
from thinkserve.strategies.testing import ScriptedEngine

Serve = Callable[..., Any]
POST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
Until = Callable[..., float]


class Slow(ScriptedBackend):
    """Renders when the prompt says "slow" only once it is let."""

    def __init__(self, engine: ScriptedEngine) -> None:
        super().__init__(engine)
        self.waiting = 0
        self.let = False

    async def render(
        self, messages: Sequence[Mapping[str, Any]], *, thinking: bool | None = None, kwargs: Mapping[str, Any] = {}
    ) -> Rendered:
        """As the base does, later."""
        if messages[0]["content"] == "odd":
            raise BadOptions("The chat template cannot render these messages.", "messages")
        self.waiting += 1
        try:
            while messages[0]["content"] == "slow" and not self.let:
                await anyio.sleep(0.005)
        finally:
            self.waiting -= 1
        return await super().render(messages, thinking=thinking, kwargs=kwargs)


def slow_server(serve: Serve, **settings: Any) -> tuple[Any, Slow]:
    engine = ScriptedEngine(["t</think>a"])
    backend = Slow(engine)
    return serve(engine, backend, **settings), backend


def code(answer: httpx.Response) -> tuple[int, str | None]:
    return answer.status_code, answer.json().get("error", {}).get("code")


@pytest.mark.parametrize("stream", [False, True])
def test_chats_that_wait_to_be_rendered_take_places(serve: Serve, until: Until, stream: bool) -> None:
    """More than there are places for are told so at once, before anybody works on them."""
    server, backend = slow_server(serve, max_inflight=2)
    inside = [server.send_chat("slow", stream=stream) for _ in range(2)]
    until(lambda: backend.waiting == 2)

    refused = server.chat()

    assert code(refused) == (503, "overloaded")
    assert int(refused.headers["retry-after"]) > 0
    assert server.metric("admission_rejections_total", reason="inflight") == 1
    backend.let = True
    for connection in inside:
        with connection:
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")
    until(lambda: server.chat().status_code == 200)


def test_a_body_that_never_comes_keeps_nobody_out(serve: Serve, until: Until) -> None:
    """Whoever has said what it wants is served, however many have not."""
    server, _ = slow_server(serve, max_inflight=1)
    head = POST + b"Content-Type: application/json\r\nContent-Length: 99\r\n\r\n"
    silent = [server.raw() for _ in range(3)]
    for connection in silent:
        connection.sendall(head + b"{")
    time.sleep(0.2)

    assert 200 == server.chat().status_code
    for connection in silent:
        connection.close()


def test_a_place_is_given_back_once_however_the_request_ends(serve: Serve, until: Until) -> None:
    """Afterwards there is room for exactly as many as before."""
    server, backend = slow_server(serve, max_inflight=1)
    post = server.client.post
    assert code(post("/v1/chat/completions", content=b"{", headers={"Content-Type": "application/json"}))[0] == 400
    assert code(post("/v1/chat/completions", content=b"{}"))[0] == 415
    assert code(server.chat("odd")) == (400, "value_out_of_range")
    assert code(server.chat(model="other"))[0] == 404
    assert code(server.chat("slow", strategy={"name": "single", "timeout_s": 0.1})) == (504, "deadline_exceeded")
    connection = server.send_chat("slow")
    until(lambda: backend.waiting == 1)
    connection.close()
    until(lambda: backend.waiting == 0)
    until(lambda: server.chat(stream=True).status_code == 200)
    until(lambda: server.chat().status_code == 200)
    until(lambda: server.metric("requests_inflight") == 0)
    with server.send_chat("slow"):
        until(lambda: backend.waiting == 1)
        assert code(server.chat()) == (503, "overloaded")
    until(lambda: server.chat().status_code == 200)


def test_the_deadline_passes_while_a_prompt_waits_to_be_rendered(serve: Serve) -> None:
    """Told and counted as any other deadline."""
    server, backend = slow_server(serve)
    body = {"model": "m", "messages": [{"role": "user", "content": "slow"}]}

    started = monotonic()
    answer = server.client.post("/v1/chat/completions", json=body, headers={"X-Request-Timeout-Ms": "200"})

    assert monotonic() - started < 2
    assert code(answer) == (504, "deadline_exceeded")
    assert answer.headers["x-should-retry"] == "false"
    assert answer.headers["x-request-id"].startswith("req_")
    assert backend.waiting == 0
    assert server.metric("requests_total", outcome="deadline", strategy="none") == 1
    assert server.metric("requests_total", outcome="error", strategy="none") == 0
    assert server.metric("requests_inflight") == 0


def test_rendering_that_nobody_can_interrupt_is_still_too_late(serve: Serve) -> None:
    """A thread works on to its end; its prompt is not run."""

    class Busy(ScriptedBackend):
        async def render(self, *args: Any, **named: Any) -> Rendered:
            await anyio.to_thread.run_sync(time.sleep, 0.5)
            return await super().render(*args, **named)

    engine = ScriptedEngine(["t</think>a"])
    server = serve(engine, Busy(engine))
    assert code(server.chat(strategy={"name": "single", "timeout_s": 0.2})) == (504, "deadline_exceeded")
    assert engine.history == []


def test_what_rendering_took_is_taken_off_the_deadline(serve: Serve) -> None:
    """The deadline is the whole request's."""
    engine = ScriptedEngine(["t" * 9000], tick=0.01)
    backend = Slow(engine)
    server = serve(engine, backend)
    threading.Timer(1.0, lambda: setattr(backend, "let", True)).start()
    started = monotonic()
    server.chat("slow", strategy={"name": "single", "timeout_s": 1.5})
    assert 1.4 < monotonic() - started < 2.4


def test_leaving_while_a_prompt_waits_to_be_rendered_ends_the_wait(serve: Serve, until: Until) -> None:
    """Nothing is started for it, and it is counted as a client that left."""
    server, backend = slow_server(serve)
    connection = server.send_chat("slow")
    until(lambda: backend.waiting == 1)

    connection.close()

    assert until(lambda: backend.waiting == 0) < 0.5
    until(lambda: server.metric("client_disconnects_total", phase="waiting") == 1)
    assert server.metric("requests_total", outcome="aborted", strategy="none") == 1
    assert server.metric("abort_latency_seconds_count") == 1
    assert server.engine.history == []
