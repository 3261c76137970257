"""Keys: every path but the public ones needs one, compared without a hint in time, and each has a cache of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from thinkserve.server.auth import load_keys, make_key
from thinkserve.server.model_dir import StartError
from thinkserve.server.settings import Settings
from thinkserve.strategies.testing import ScriptedEngine

Serve = Callable[..., Any]


def test_keys_come_from_environment_and_file(tmp_path: Path) -> None:
    """Comments and blank lines are skipped; both sources count."""
    file = tmp_path / "keys"
    file.write_text("# ours\nfile-key\n\n")
    keys = load_keys(Settings(api_keys=SecretStr("a, b"), api_keys_file=file))
    assert [key.digest for key in keys] == [make_key(secret).digest for secret in ("a", "b", "file-key")]
    assert len({key.salt for key in keys}) == len({key.id for key in keys}) == 3


def test_a_setting_without_a_key_does_not_open_the_server(tmp_path: Path) -> None:
    """An empty variable or file is a mistake of the operator, told at start."""
    empty = tmp_path / "keys"
    empty.write_text("# none yet\n")
    for settings in (
        Settings(api_keys=SecretStr(" , ")),
        Settings(api_keys_file=empty),
        Settings(api_keys_file=tmp_path / "no"),
    ):
        with pytest.raises(StartError):
            load_keys(settings)
    assert load_keys(Settings()) == ()


def test_only_a_valid_key_gets_in_and_public_routes_need_none(serve: Serve) -> None:
    """Deny by default, in the one error shape, with the challenge of RFC 6750; failures are counted."""
    server = serve(ScriptedEngine(["t</think>a"]), api_keys=SecretStr("k1,schlüssel"))
    routes = ["/v1/models", "/metrics", "/openapi.json", "/nope", "//health", "/health/", "/%68ealth/x", "/HEALTH"]
    for path in routes:
        answer = server.client.get(path)
        assert answer.status_code == 401, path
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert answer.headers["www-authenticate"] == "Bearer"
    for value in (
        b"k1",
        b"Bearer",
        b"Basic k1",
        b"Bearer k2",
        b"Bearer K1",
        b"Bearer \xff\xfe",
        b"Bearer " + b"k" * 9000,
    ):
        assert server.client.get("/v1/models", headers={b"Authorization": value}).status_code == 401
    for value in (b"Bearer k1", b"bearer k1", "Bearer schlüssel".encode()):
        assert server.client.get("/v1/models", headers={b"Authorization": value}).status_code == 200
    with server.raw() as connection:
        connection.sendall(b"GET /v1/../health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 401 ")
    for path in ("/health", "/livez", "/readyz", "/version"):
        assert server.client.get(path).status_code == 200
    page = server.client.get("/metrics", headers={"Authorization": "Bearer k1"}).text
    assert f"thinkserve_auth_failures_total {len(routes) + 8}.0" in page


def test_each_key_has_its_own_cache(serve: Serve) -> None:
    """Prefixes are shared within a key and never between keys; a server without keys has one cache."""
    server = serve(ScriptedEngine(["t</think>a"]), api_keys=SecretStr("k1,k2"))
    for secret in ("k1", "k2", "k1"):
        server.client.headers["Authorization"] = f"Bearer {secret}"
        assert server.chat().status_code == 200
    salts = [salt for salt in server.backend.salts if salt is not None]
    assert salts == [make_key(secret).salt for secret in ("k1", "k2", "k1")]
    assert "k1" not in salts[0]
    open_server = serve(ScriptedEngine(["t</think>a"]))
    open_server.chat()
    assert set(open_server.backend.salts) == {None}
