"""What surrounds every route: ids, headers, limits, and one error shape on a real socket."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from time import monotonic
from typing import Any

import anyio
import httpx
import pytest
from starlette.types import Message, Receive, Scope, Send

from thinkserve.server import http_protocol, middleware
from thinkserve.server.auth import are_needed, load_keys
from thinkserve.server.errors import ApiError
from thinkserve.server.middleware import BodyLimit, answered_hosts, new_request_id
from thinkserve.server.settings import Settings
from thinkserve.server.testing import ScriptedBackend
from thinkserve.strategies.testing import ScriptedEngine

Serve = Callable[..., Any]
POST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
LEAKS = ("Traceback", "0x", "/work", "site-packages")


@pytest.fixture
def server(serve: Serve) -> Any:
    return serve(ScriptedEngine(["t</think>a"]), max_body_bytes=4096)


def fault(answer: httpx.Response) -> tuple[int, str]:
    """Status and code of an error, whose shape and words are checked."""
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert not any(leak in answer.text for leak in LEAKS)
    assert answer.headers["x-request-id"].startswith("req_")
    return answer.status_code, error["code"]


def exchange(server: Any, raw: bytes) -> tuple[int, dict[str, Any]]:
    """Status and JSON of the answer to raw bytes; (0, {}) when the connection is closed without one."""
    with server.raw() as connection:
        connection.sendall(raw)
        data = b""
        try:
            while part := connection.recv(65536):
                data += part
        except ConnectionResetError:
            pass
    if not data:
        return 0, {}
    head, _, body = data.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


def test_ids_are_ours_unique_and_in_order_of_time() -> None:
    """UUIDv7: version and variant bits in place."""
    ids = [new_request_id() for _ in range(1000)]
    assert len(set(ids)) == 1000
    assert all(each.startswith("req_") and each[16] == "7" and each[20] in "89ab" for each in ids)
    assert [each[:16] for each in ids] == sorted(each[:16] for each in ids)


def test_the_clients_id_is_echoed_if_it_is_harmless_and_never_used(server: Any) -> None:
    """Ours identifies the request, whatever they send."""
    answer = server.client.get("/v1/models", headers={"X-Request-Id": "abc-1:2.3_x"})
    assert answer.headers["x-client-request-id"] == "abc-1:2.3_x"
    assert answer.headers["x-request-id"] != "abc-1:2.3_x"
    for bad in ("a b", "x" * 129, "a/b", "ä".encode()):
        assert "x-client-request-id" not in server.client.get("/v1/models", headers={"X-Request-Id": bad}).headers


def test_every_response_carries_the_safety_headers(server: Any) -> None:
    """Errors too."""
    for path in ("/v1/models", "/nope", "/livez"):
        headers = server.client.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert int(headers["openai-processing-ms"]) >= 0
        assert "server" not in headers
        assert "access-control-allow-origin" not in headers


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nope", 404, "route_not_found"),
        ("GET", "/v1/models/", 404, "model_not_found"),
        ("GET", "//v1/models", 404, "route_not_found"),
        ("GET", "/docs", 404, "route_not_found"),
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
        ("PUT", "/v1/models", 405, "method_not_allowed"),
        ("get", "/v1/models", 405, "method_not_allowed"),
        ("OPTIONS", "/v1/chat/completions", 405, "method_not_allowed"),
        ("BREW", "/v1/models", 405, "method_not_allowed"),
    ],
)
def test_wrong_routes_and_methods_have_the_error_shape(
    server: Any, method: str, path: str, status: int, code: str
) -> None:
    """Also methods nobody has heard of."""
    raw = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
    found, body = exchange(server, raw)
    if (method, path) == ("GET", "/v1/models/"):
        assert found == 404
    else:
        assert (found, body["error"]["code"]) == (status, code)


def test_bodies_that_are_not_plain_json_are_refused(server: Any) -> None:
    """415 by the headers alone, 400 by the content."""
    post = server.client.post
    path = "/v1/chat/completions"
    assert fault(post(path, content=b"{}")) == (415, "unsupported_media_type")
    assert fault(post(path, data={"a": "b"})) == (415, "unsupported_media_type")
    kind = {"Content-Type": "application/json"}
    assert fault(post(path, content=b"{}", headers={**kind, "Content-Encoding": "gzip"}))[0] == 415
    for content in (b"", b"{", b"\xff", b"[1]", b"null"):
        assert fault(post(path, content=content, headers=kind))[0] == 400


def test_a_body_over_the_cap_is_refused_with_and_without_a_length(server: Any) -> None:
    """413 reaches the client in both cases, and the canary beside it is answered."""

    def chunks() -> Iterator[bytes]:
        for _ in range(6):
            yield b" " * 1000

    kind = {"Content-Type": "application/json"}
    with httpx.Client(base_url=server.url) as client:
        declared = client.post("/v1/chat/completions", content=b" " * 5000, headers=kind)
        streamed = client.post("/v1/chat/completions", content=chunks(), headers=kind)
    assert fault(declared) == fault(streamed) == (413, "body_too_large")
    assert declared.headers["connection"] == "close"
    assert server.chat().status_code == 200


def test_a_declared_monster_is_refused_before_it_is_sent(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer comes at once, and the connection is closed."""
    monkeypatch.setattr(middleware, "LINGER_S", 0.2)
    head = POST + b"Content-Type: application/json\r\n"
    started = monotonic()
    status, body = exchange(server, head + b"Content-Length: 99999999999\r\n\r\n")
    assert (status, body["error"]["code"]) == (413, "body_too_large")
    assert monotonic() - started < 5


def test_too_many_or_too_large_headers_are_431(server: Any) -> None:
    """By count in the app, by size in the protocol."""
    many = b"".join(b"x-%d: y\r\n" % number for number in range(200))
    status, body = exchange(server, b"GET /livez HTTP/1.1\r\nHost: localhost\r\n" + many + b"Connection: close\r\n\r\n")
    assert (status, body["error"]["code"]) == (431, "headers_too_large")
    status, body = exchange(server, b"GET /livez HTTP/1.1\r\nHost: localhost\r\nx: " + b"y" * 70_000)
    assert (status, body.get("error", {}).get("code")) in {(431, "headers_too_large"), (0, None)}


def test_what_is_not_http_is_400_in_our_shape(server: Any) -> None:
    """The protocol's own errors are JSON as well."""
    status, body = exchange(server, b"NOT HTTP AT ALL\r\n\r\n")
    assert (status, body["error"]["code"]) == (400, "invalid_request")


def test_two_ways_to_end_a_body_are_400(server: Any) -> None:
    """The start of every smuggling attack."""
    head = POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert exchange(server, head + b"0\r\n\r\n")[0] == 400


def test_a_head_that_trickles_is_cut_off(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a fresh connection and on one that is kept alive."""
    monkeypatch.setattr(http_protocol, "HEAD_TIMEOUT_S", 0.3)
    server = serve(ScriptedEngine(["t</think>a"]))
    for before in (b"", b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"):
        with server.raw() as connection:
            connection.settimeout(5)
            if before:
                connection.sendall(before)
                assert b"200 OK" in connection.recv(65536)
            connection.sendall(b"GET /livez HTTP/1.1\r\nHo")
            started, answer = monotonic(), b""
            while part := connection.recv(65536):
                answer += part
            assert b" 408 " in answer
            assert 0.1 < monotonic() - started < 3


def test_only_known_hosts_are_answered_if_the_operator_says_so(serve: Serve) -> None:
    """Probes are answered for any host: they tell nothing, and orchestrators use addresses."""
    server = serve(ScriptedEngine(["t</think>a"]), allowed_hosts=("api.example", "*.inner.example"))
    for host, status in (
        ("api.example", 200),
        ("API.example:8000", 200),
        ("a.inner.example", 200),
        ("evil.example", 400),
    ):
        assert server.client.get("/v1/models", headers={"Host": host}).status_code == status
    assert fault(server.client.get("/v1/models", headers={"Host": "x"})) == (400, "invalid_host")
    assert server.client.get("/readyz", headers={"Host": "10.0.0.1"}).status_code == 200


@pytest.mark.parametrize(
    ("settings", "closed"),
    [({}, True), ({"api_keys": "key"}, False), ({"host": "0.0.0.0"}, False), ({"host": "::1"}, True)],
)
def test_pages_of_others_cannot_ask_a_local_server_without_keys(settings: dict[str, Any], closed: bool) -> None:
    """Their names may point to this machine, but they stay in the Host header."""
    given, chosen = Settings(**settings), Settings(allowed_hosts=("a",), **settings)
    hosts = answered_hosts(given, are_needed(load_keys(given)))
    assert ("*" in hosts) == (not closed)
    assert answered_hosts(chosen, are_needed(load_keys(chosen))) == ("a",)


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost:8000", 200), ("127.0.0.1", 200), ("[::1]:8000", 200), ("a.localhost", 200), ("evil.example", 400)],
)
def test_a_local_server_without_keys_answers_for_its_own_names(serve: Serve, host: str, status: int) -> None:
    """By default."""
    server = serve(ScriptedEngine(["t</think>a"]))
    assert server.client.get("/v1/models", headers={"Host": host}).status_code == status


def test_an_unforeseen_error_is_a_plain_500_that_is_not_to_be_retried(serve: Serve) -> None:
    """A fixed sentence with the request's id; what went wrong is in the log only."""

    class Broken(ScriptedBackend):
        async def render(self, *_: Any, **__: Any) -> Any:
            raise RuntimeError("secret at 0xdeadbeef in /srv/file.py")

    engine = ScriptedEngine(["a"])
    answer = serve(engine, Broken(engine)).chat()
    assert fault(answer) == (500, "internal_error")
    assert answer.headers["x-should-retry"] == "false"
    assert "secret" not in answer.text
    assert answer.headers["x-request-id"] in answer.json()["error"]["message"]


def test_http_1_0_is_answered_and_closed(server: Any) -> None:
    """As old clients expect."""
    with server.raw() as connection:
        connection.sendall(b"GET /livez HTTP/1.0\r\n\r\n")
        connection.settimeout(5)
        data = b""
        while part := connection.recv(65536):
            data += part
    assert b"200 OK" in data
    assert data.endswith(b'{"status":"ok"}')


def test_probes_tell_life_from_readiness(server: Any) -> None:
    """Without its engine the server lives, but is not ready."""
    for path in ("/health", "/livez", "/readyz"):
        assert server.client.get(path).status_code == 200
    assert server.client.get("/health").content == b""
    assert "thinkserve_build_info" in server.client.get("/metrics").text


def test_a_request_in_two_packets_is_one_request(server: Any) -> None:
    """Heads and bodies may arrive in any slices."""
    connection: socket.socket
    content = json.dumps({"model": "m", "messages": [{"role": "user", "content": "x"}]}).encode()
    with server.raw() as connection:
        head = POST + b"Content-Type: application/json\r\nConnection: close\r\n"
        for part in (head[:30], head[30:], b"Content-Length: %d\r\n\r\n" % len(content), content[:9], content[9:]):
            connection.sendall(part)
        data = b""
        while part := connection.recv(65536):
            data += part
    assert data.startswith(b"HTTP/1.1 200 OK")


@pytest.mark.anyio
async def test_a_body_that_trickles_is_given_up() -> None:
    """408 once the time for it is over; what has come so far is dropped."""

    async def receive() -> Message:
        await anyio.sleep(0.03)
        return {"type": "http.request", "body": b"x", "more_body": True}

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive()).get("more_body"):
            pass

    async def send(message: Message) -> None:
        raise AssertionError("nothing is sent here")

    started = monotonic()
    with pytest.raises(ApiError) as refused:
        await BodyLimit(app, 10**6, 0.2)({"type": "http", "headers": []}, receive, send)
    assert (refused.value.status, refused.value.code) == (408, "request_timeout")
    assert refused.value.headers["Connection"] == "close"
    assert monotonic() - started < 2
