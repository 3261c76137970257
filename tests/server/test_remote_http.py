"""Requests to a remote server: what is tried again and what is not, what is read and what is told of it."""

from __future__ import annotations

import gzip
import json
import ssl
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from pathlib import Path
from time import monotonic
from typing import Any

import anyio
import pytest
from anyio.abc import ByteStream
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from tests.server.remote_fake import Asked, FakeVllm, reply, told
from thinkserve.server.errors import Refused
from thinkserve.server.remote_http import RemoteHttp, error_message
from thinkserve.server.settings import RemoteSettings
from thinkserve.strategies.errors import EngineDead, EngineFailed

pytestmark = pytest.mark.anyio

Fault = Callable[[Asked, ByteStream], Coroutine[Any, Any, bool]]
KEY = "sk-sesame"


@asynccontextmanager
async def client(fake: FakeVllm, **settings: Any) -> AsyncIterator[RemoteHttp]:
    """A client of the fake."""
    async with fake.running() as url:
        http = RemoteHttp(url, RemoteSettings(**settings), KEY, "The remote verifier")
        try:
            yield http
        finally:
            await http.aclose()


def answering(*replies: bytes) -> Fault:
    """Answers the first requests with these, and the others as ever."""
    left = list(replies)

    async def fault(asked: Asked, stream: ByteStream) -> bool:
        if not left:
            return False
        await stream.send(left.pop(0))
        return True

    return fault


def error(message: str, status: int, **headers: str) -> bytes:
    return told({"error": {"message": message, "type": "X", "code": status}}, status, **headers)


async def ask(http: RemoteHttp) -> dict[str, object]:
    return await http.post("/tokenize", {"prompt": "hi"})


async def fails(http: RemoteHttp, kind: type[Exception] = EngineFailed) -> str:
    """What a request that must fail says."""
    with pytest.raises(kind) as caught:
        await ask(http)
    message = str(caught.value)
    assert KEY not in message
    assert "127.0.0.1" not in message
    return message


@pytest.mark.parametrize("status", [429, 503])
async def test_an_overloaded_server_is_asked_again_when_it_says(status: int) -> None:
    """Not before its Retry-After has passed."""
    fake = FakeVllm(fault=answering(error("busy", status, retry_after="1")))
    async with client(fake) as http:
        start = monotonic()
        found = await ask(http)

    assert 2 == len(fake.asked)
    assert found["tokens"]
    assert 1.0 <= monotonic() - start < 10


async def test_an_overloaded_server_is_not_asked_for_ever() -> None:
    """After the last retry its own words are told."""
    fake = FakeVllm(fault=answering(*[error("Queue is full", 503)] * 9))
    async with client(fake, retries=2) as http:
        assert "The remote verifier is overloaded (503): Queue is full" == await fails(http)

    assert 3 == len(fake.asked)


@pytest.mark.parametrize(("pause", "longest"), [("60", 120.0), ("60", 30.0)], ids=["past the deadline", "too long"])
async def test_a_pause_that_nobody_can_wait_for_is_not_begun(pause: str, longest: float) -> None:
    """It would end after the request's deadline, or is longer than this server waits for anybody."""
    fake = FakeVllm(fault=answering(error("busy", 503, retry_after=pause)))
    async with client(fake, longest_wait_s=longest) as http:
        with anyio.fail_after(5):
            assert "overloaded" in await fails(http)

    assert 1 == len(fake.asked)


async def test_a_server_that_is_not_there_is_tried_again_and_then_named() -> None:
    """Connection refused, each time."""
    async with FakeVllm().running() as url:
        pass
    http = RemoteHttp(url, RemoteSettings(retries=1, breaker_failures=1), KEY, "The remote verifier")

    assert "The remote verifier cannot be reached." == await fails(http)
    assert not http.alive
    await http.aclose()


async def test_a_server_that_never_answers_is_given_up_and_not_tried_again() -> None:
    """It may be at work; one read timeout is all it gets."""

    async def fault(asked: Asked, stream: ByteStream) -> bool:
        await anyio.sleep(30)
        return True

    fake = FakeVllm(fault=fault)
    async with client(fake, read_timeout_s=0.1) as http:
        with anyio.fail_after(5):
            assert "The remote verifier does not answer." == await fails(http)

    assert 1 == len(fake.asked)


async def test_a_body_that_stops_half_way_is_an_error() -> None:
    """The connection ends before as many bytes as were promised."""
    fake = FakeVllm(fault=answering(reply(b'{"tokens": [1]}')[:-4]))
    async with client(fake) as http:
        assert "broke off" in await fails(http)


@pytest.mark.parametrize("status", [400, 413, 422, 501])
async def test_a_refused_request_is_told_from_a_failure_and_the_server_well(status: int) -> None:
    """Its words are told; asking again would change nothing, and nothing is wrong with the server."""
    fake = FakeVllm(fault=answering(error("stop: too many\n\x1b[31mstrings", status)))
    async with client(fake, breaker_failures=1) as http:
        message = await fails(http, Refused)
        assert http.alive

    assert f"The remote verifier refuses the request ({status}): stop: too many\ufffd\ufffd[31mstrings" == message
    assert 1 == len(fake.asked)


@pytest.mark.parametrize("status", [301, 302, 307, 308])
async def test_a_redirect_is_not_followed(status: int) -> None:
    """The key goes to the configured server and nowhere else."""
    elsewhere = FakeVllm()
    async with elsewhere.running() as other:
        fake = FakeVllm(fault=answering(reply(b"", status, location=f"{other}/tokenize")))
        async with client(fake) as http:
            assert "redirects to somewhere else" in await fails(http)

    assert (1, 0) == (len(fake.asked), elsewhere.connections)


async def test_proxies_of_the_environment_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor are its credentials (.netrc)."""
    proxy = FakeVllm()
    async with proxy.running() as url:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, url)
        fake = FakeVllm()
        async with client(fake) as http:
            await ask(http)

    assert (1, 0) == (len(fake.asked), proxy.connections)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 429, 500, 503])
async def test_the_key_is_never_told(status: int) -> None:
    """Not even if the server repeats it, in whatever shape its errors have."""
    for body in ({"error": {"message": f"bad key {KEY}"}}, {"error": f"Unauthorized {KEY}"}, {"message": KEY}):
        async with client(FakeVllm(fault=answering(told(body, status))), retries=0) as http:
            await fails(http, Refused if status == 400 else EngineFailed)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"<html>", "not JSON"),
        (b"[1]", "not a JSON object"),
        (b"\xff\xfe", "not JSON"),
        (b'{"tokens": [' + b"1," * 900 + b"1]}", "more than 1000 bytes"),
    ],
)
async def test_an_answer_that_makes_no_sense_is_an_error(body: bytes, words: str) -> None:
    """And is read only up to the limit."""
    async with client(FakeVllm(fault=answering(reply(body))), max_body_bytes=1000) as http:
        assert words in await fails(http)


async def test_an_endless_error_is_read_up_to_a_limit() -> None:
    """A few kilobytes tell what went wrong, or nothing does."""
    sent = 0

    async def fault(asked: Asked, stream: ByteStream) -> bool:
        nonlocal sent
        await stream.send(b"HTTP/1.1 500 X\r\ncontent-length: 1000000000\r\n\r\n")
        for _ in range(1000):
            await stream.send(b"x" * 65536)
            sent += 1
        return True

    async with client(FakeVllm(fault=fault)) as http:
        with anyio.fail_after(5):
            assert "The remote verifier answered 500." == await fails(http)

    assert sent < 1000


async def test_a_compressed_answer_is_not_unpacked() -> None:
    """None was asked for, and a small one can be very large inside."""
    fake = FakeVllm(fault=answering(reply(gzip.compress(b'{"tokens": []}'), content_encoding="gzip")))
    async with client(fake) as http:
        assert "compresses" in await fails(http)

    assert "identity" == fake.asked[0].headers["accept-encoding"]


async def test_the_breaker_opens_and_the_server_recovers() -> None:
    """While it is open nothing is sent and the model is not alive; then one call finds the server well again."""
    fake = FakeVllm(fault=answering(*[error("no", 500)] * 3))
    async with client(fake, breaker_failures=3, breaker_cooldown_s=0.2) as http:
        lived = []
        for _ in range(3):
            lived.append(http.alive)
            await fails(http)
        lived.append(http.alive)
        assert "has failed too often and is left alone for a while" in await fails(http)
        assert 3 == len(fake.asked)
        await anyio.sleep(0.25)
        lived.append(http.alive)
        assert (await ask(http))["tokens"]

        assert [True, True, True, False, True, True] == [*lived, http.alive]


async def test_more_calls_than_connections_wait_for_each_other() -> None:
    """And give up when none comes free in time, which is not held against the server."""

    async def fault(asked: Asked, stream: ByteStream) -> bool:
        await anyio.sleep(0.3)
        return False

    fake = FakeVllm(fault=fault)
    async with client(fake, max_connections=1, pool_timeout_s=0.1, breaker_failures=1) as http:
        async with anyio.create_task_group() as group:
            group.start_soon(ask, http)
            await anyio.sleep(0.05)
            assert "all of its connections in use" in await fails(http)
        assert http.alive


async def test_after_closing_nothing_is_sent() -> None:
    """EngineDead, not an error of some library."""
    fake = FakeVllm()
    async with client(fake) as http:
        await http.aclose()
        await http.aclose()
        assert not http.alive
        await fails(http, EngineDead)

    assert [] == fake.asked


async def test_a_certificate_is_checked(tmp_path: Path) -> None:
    """One that nobody vouches for ends the matter before the key is sent; an operator may vouch for it."""
    tls = self_signed(tmp_path / "cert.pem")
    fake = FakeVllm()
    async with fake.running(tls) as url:
        for ca_file in (None, tmp_path / "cert.pem"):
            http = RemoteHttp(url, RemoteSettings(retries=0, ca_file=ca_file), KEY, "The remote verifier")
            try:
                if ca_file is None:
                    assert "The remote verifier cannot be reached." == await fails(http)
                    assert [] == fake.asked
                else:
                    assert (await ask(http))["tokens"]
            finally:
                await http.aclose()


def self_signed(file: Path) -> ssl.SSLContext:
    """A server's side of TLS for 127.0.0.1; the certificate and its key are written to the file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    today = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(today - timedelta(days=1))
        .not_valid_after(today + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(IPv4Address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    file.write_bytes(certificate.public_bytes(Encoding.PEM) + private)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file)
    return context


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"error": {"message": "no", "code": 400}}, "no"),
        ({"error": "Unauthorized"}, "Unauthorized"),
        ({"message": "no"}, "no"),
        ({"error": {"detail": 1}}, ""),
        ({"error": None}, ""),
        ([], ""),
        ("no", "no"),
    ],
)
def test_the_words_of_an_error_are_found(content: object, message: str) -> None:
    """In vLLM's shape, in that of its authentication, and in those of servers in between."""
    assert message == error_message(json.dumps(content).encode())
