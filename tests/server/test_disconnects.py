"""A client that leaves takes all of its chains with it, at once, in whatever phase and mode; its tokens still count."""

from __future__ import annotations

import logging
import socket
import struct
from collections.abc import Callable
from typing import Any

import pytest

from thinkserve.strategies.testing import ScriptedEngine

Serve = Callable[..., Any]
Until = Callable[..., float]
RACE = {"name": "short-m-at-k", "params": {"k": 4, "m": 2}}
SOON = 0.5


def drop(connection: socket.socket, reset: bool) -> None:
    """Close politely, or as a crashed client's kernel does."""
    if reset:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("strategy", ["single", RACE], ids=["single", "race"])
@pytest.mark.parametrize("reset", [False, True], ids=["fin", "rst"])
@pytest.mark.parametrize("tick", [0.005, 3600], ids=["writing", "silent"])
def test_leaving_while_chains_run_aborts_them(
    serve: Serve, until: Until, stream: bool, strategy: Any, reset: bool, tick: float
) -> None:
    """Thinking aloud or silent, plain or streamed, one chain or a race."""
    server = serve(ScriptedEngine(["t" * 9000], tick=tick))
    connection = server.send_chat(stream=stream, strategy=strategy)
    until(lambda: len(server.engine.live) == (1 if strategy == "single" else 4))
    drop(connection, reset)
    assert until(lambda: server.engine.live == []) < SOON
    until(lambda: server.server.state.admission.inflight == 0)
    name = strategy if isinstance(strategy, str) else "short-m-at-k"
    assert server.metric("requests_total", outcome="aborted", strategy=name) == 1
    assert server.metric("chains_inflight") == 0
    spent = [server.metric("tokens_total", kind=kind, strategy=name) for kind in ("visible", "reasoning", "wasted")]
    assert sum(spent) == server.engine.generated


@pytest.mark.parametrize("stream", [False, True])
def test_leaving_in_the_middle_of_the_answer_aborts_it(serve: Serve, until: Until, stream: bool) -> None:
    """And is counted as having left while answering."""
    server = serve(ScriptedEngine(["</think>" + "a" * 9000], tick=0.005))
    connection = server.send_chat(stream=stream)
    until(lambda: server.engine.generated > 20)
    connection.close()
    assert until(lambda: server.engine.live == []) < SOON
    until(lambda: server.metric("client_disconnects_total", phase="answering") == 1)


@pytest.mark.parametrize("cut", [10, 120, 200])
def test_leaving_before_the_body_is_complete_starts_nothing(
    serve: Serve, until: Until, cut: int, caplog: pytest.LogCaptureFixture
) -> None:
    """In the head or in the body; it is no failure of the server's, so the log does not hold one."""
    server = serve(ScriptedEngine(["t"]))
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += b"Content-Length: 900\r\n\r\n"
    connection = server.raw()
    connection.sendall((head + b'{"model": "m", "messages": [' + b" " * 900)[:cut])
    connection.close()
    assert server.chat().status_code == 200
    assert len(server.engine.history) == 1
    until(lambda: not server.server._uvicorn.server_state.tasks)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


@pytest.mark.parametrize("stream", [False, True])
def test_leaving_at_the_very_end_is_harmless(serve: Serve, until: Until, stream: bool) -> None:
    """Whether or not the last bytes arrive, the request has exactly one outcome and nothing stays behind."""
    server = serve(ScriptedEngine(["t</think>a"]))
    for _ in range(10):
        server.send_chat(stream=stream).close()
    until(lambda: server.metric("requests_inflight") == 0 and not server.engine.live)
    outcomes = [server.metric("requests_total", outcome=name, strategy="single") for name in ("ok", "aborted")]
    assert sum(outcomes) == len({stream.index for stream in server.engine.history})
    assert server.chat().status_code == 200


def test_others_are_not_disturbed(serve: Serve, until: Until) -> None:
    """A canary beside ten clients that come and go answers as it does alone."""
    server = serve(ScriptedEngine(lambda job, _: "t</think>ok" if len(job.prompt) < 20 else "t" * 9000, tick=0.002))
    alone = server.chat().json()["choices"]
    for number in range(10):
        connection = server.send_chat("a long question indeed", stream=bool(number % 2), strategy=RACE)
        until(lambda: len(server.engine.live) >= 4)
        assert server.chat().json()["choices"] == alone
        connection.close()
        until(lambda: server.engine.live == [])
    assert server.metric("requests_total", outcome="aborted", strategy="short-m-at-k") == 10


def test_the_time_until_all_chains_are_gone_is_measured(serve: Serve, until: Until) -> None:
    """`abort_latency_seconds`, which an operator can alert on."""
    server = serve(ScriptedEngine(["t" * 9000], tick=0.005))
    connection = server.send_chat(strategy=RACE)
    until(lambda: len(server.engine.live) == 4)
    connection.close()
    until(lambda: server.metric("abort_latency_seconds_count") == 1)
    assert server.metric("abort_latency_seconds_sum") < SOON
