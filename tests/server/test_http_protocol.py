"""What a connection may keep open, and for how long, on a real socket: no state of it is without a clock."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from time import monotonic, sleep
from typing import Any

import pytest

from thinkserve.server import http_protocol
from thinkserve.strategies.testing import ScriptedEngine

Serve = Callable[..., Any]
Until = Callable[..., float]
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
POST = HEAD + b"Content-Length: %d\r\n\r\n"
GET = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"
LONG_BODY = POST % 4_000_000


@pytest.fixture
def server(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A server with keys, so that a request without one is answered before its body is read; its clocks run fast."""
    monkeypatch.setattr(http_protocol, "LINGER_S", 0.5)
    monkeypatch.setattr(http_protocol, "HEAD_TIMEOUT_S", 0.4)
    return serve(ScriptedEngine(["t</think>a"]), api_keys="secret")


def answered(connection: socket.socket, request: bytes, status: bytes) -> None:
    """Send, and read the whole answer."""
    connection.sendall(request)
    answer = b""
    while b"\r\n\r\n" not in answer:
        answer += connection.recv(65536)
    head, _, body = answer.lower().partition(b"\r\n\r\n")
    assert head.startswith(b"http/1.1 " + status)
    assert b"connection: close" not in head
    left = int(head.partition(b"content-length:")[2].split()[0]) - len(body)
    while left > 0:
        left -= len(connection.recv(left))


def taken(connection: socket.socket, seconds: float) -> float:
    """How long the server takes a byte now and then; it is asked for so many seconds at most."""
    started = monotonic()
    try:
        while monotonic() - started < seconds:
            connection.sendall(b"x")
            sleep(0.05)
    except ConnectionError:
        pass
    return monotonic() - started


def until_closed(connection: socket.socket) -> bytes:
    """All that comes until the server closes."""
    connection.settimeout(3)
    return b"".join(iter(lambda: connection.recv(65536), b""))


def closes_within(connection: socket.socket, seconds: float) -> bool:
    """Whether the server closes in time, without another word."""
    connection.settimeout(seconds)
    try:
        return connection.recv(65536) == b""
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False


@pytest.mark.parametrize(
    ("request_head", "status"),
    [
        (LONG_BODY, b"401"),
        (LONG_BODY.replace(b"/v1/chat/completions", b"/livez"), b"405"),
        (LONG_BODY.replace(b"/json", b"/x\r\nAuthorization: Bearer secret"), b"415"),
    ],
    ids=["no key", "wrong method", "not JSON"],
)
def test_a_body_that_stops_after_its_answer_is_not_waited_for(server: Any, request_head: bytes, status: bytes) -> None:
    """One byte of it and silence."""
    with server.raw() as connection:
        answered(connection, request_head, status)
        connection.sendall(b"x")
        assert closes_within(connection, 3)


def test_a_body_that_trickles_after_its_answer_does_not_set_the_clock_back(server: Any) -> None:
    """However often a byte of it comes."""
    with server.raw() as connection:
        answered(connection, LONG_BODY, b"401")
        assert taken(connection, 5) < 3


def test_a_connection_whose_body_came_after_its_answer_serves_on(server: Any) -> None:
    """Nobody asked for anything meanwhile, so nothing is said: a client that keeps connections would misread it."""
    with server.raw() as connection:
        answered(connection, POST % 4, b"401")
        connection.sendall(b"abcd")
        assert not closes_within(connection, 1.2)
        answered(connection, GET, b"200")


def test_a_connection_whose_body_came_after_its_answer_is_closed_when_it_stays_idle(server: Any) -> None:
    """uvicorn's clock for idle connections runs again."""
    server.call(lambda: setattr(server.server._uvicorn.config, "timeout_keep_alive", 0.3))
    with server.raw() as connection:
        answered(connection, POST % 4, b"401")
        connection.sendall(b"abcd")
        assert closes_within(connection, 3)


def test_a_head_that_begins_behind_a_late_body_has_its_time(server: Any) -> None:
    """408 when the rest of it does not come."""
    with server.raw() as connection:
        answered(connection, POST % 4, b"401")
        connection.sendall(b"abcdGET /li")
        assert until_closed(connection).startswith(b"HTTP/1.1 408")


def test_a_head_that_begins_before_the_answer_has_its_time(server: Any) -> None:
    """Half of the second of two requests, in one packet with the first."""
    with server.raw() as connection:
        answered(connection, GET + b"GET /li", b"200")
        assert until_closed(connection).startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize("early", [b"\r\n", GET])
def test_a_client_that_leaves_is_noticed_though_it_has_sent_more(serve: Serve, until: Until, early: bytes) -> None:
    """The next request, or a line too many: nobody pays for what nobody reads."""
    server = serve(ScriptedEngine(["t" * 20_000], tick=0.005))
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "x"}]}).encode()
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(POST % len(body) + body)
        until(lambda: server.engine.generated > 5)
        connection.sendall(early)
        sleep(0.1)
        assert server.engine.live
    until(lambda: not server.engine.live)


def test_requests_may_follow_each_other_without_waiting(serve: Serve) -> None:
    """Each is answered, in order."""
    server = serve(ScriptedEngine(["t</think>a"]))
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "x"}]}).encode()
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(POST % len(body) + body + GET + GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        answers = until_closed(connection)
    assert 3 == answers.count(b"HTTP/1.1 200")
    assert answers.index(b"chat.completion") < answers.rindex(b"HTTP/1.1 200")
