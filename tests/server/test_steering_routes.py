"""The vectors over HTTP: anybody reads, an admin key changes, and a body is a file that is not believed."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import SecretStr, TypeAdapter

from thinkserve.server.auth import load_keys
from thinkserve.server.model_dir import StartError
from thinkserve.server.settings import Settings
from thinkserve.server.testing import ScriptedBackend
from thinkserve.server.vector_types import VectorCard, VectorDeleted, VectorList
from thinkserve.server.vectors import Shape, VectorRegistry
from thinkserve.steering.vector_file import VectorFile, serialize, view
from thinkserve.strategies.testing import ScriptedEngine

Serve = Callable[..., Any]
PATH = "/v1/steering/vectors"
BINARY = {"Content-Type": "application/octet-stream"}


def vector(first: float = 1.0, layer: int = 4, **about: Any) -> bytes:
    return serialize(VectorFile({layer: view(array("f", [first, 2.0]).tobytes())}, about))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "vectors"


def running(serve: Serve, folder: Path, **settings: Any) -> Any:
    engine = ScriptedEngine(["t</think>a"])
    registry = VectorRegistry(folder, Shape(hidden=2, layers=6, fingerprint="mine"))
    settings = {"admin_keys": SecretStr("boss"), **settings}
    return serve(engine, ScriptedBackend(engine, vectors=registry), **settings)


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}


def put(server: Any, name: str, body: bytes, key: str = "boss", **headers: str) -> httpx.Response:
    sent = {**BINARY, **bearer(key), **headers}
    answer: httpx.Response = server.client.put(f"{PATH}/{name}", content=body, headers=sent)
    return answer


def delete(server: Any, name: str, key: str = "boss") -> httpx.Response:
    answer: httpx.Response = server.client.delete(f"{PATH}/{name}", headers=bearer(key))
    return answer


def test_a_vector_is_put_read_replaced_used_and_deleted(serve: Serve, folder: Path) -> None:
    """Each answer has the published shape; a version is as new as the numbers."""
    server = running(serve, folder)
    steer = {"strategy": {"name": "single", "steer": [{"vector": "brief"}]}}

    first = put(server, "brief", vector(1.0, recipe="asc", model_fingerprint="mine"))
    second = put(server, "brief", vector(5.0, recipe="asc"))
    one, listed = server.client.get(f"{PATH}/brief").json(), server.client.get(PATH).json()
    used = server.chat(**steer)
    gone = delete(server, "brief")

    assert ([201, 1, True], [200, 2, None]) == tuple(
        [a.status_code, a.json()["version"], a.json()["made_for_this_model"]] for a in (first, second)
    )
    assert second.json() == one == TypeAdapter(VectorCard).validate_python(one, strict=True)
    assert [one] == TypeAdapter(VectorList).validate_python(listed, strict=True)["data"]
    assert ("brief", "asc", [4], 2, {"4": 5.385165}) == (
        one["id"], one["recipe"], one["layers"], one["hidden"], one["norms"],
    )  # fmt: skip
    assert 200 == used.status_code
    assert gone.json() == TypeAdapter(VectorDeleted).validate_python(gone.json(), strict=True)
    assert [400, 404, 404] == [
        server.chat(**steer).status_code, server.client.get(f"{PATH}/brief").status_code,
        delete(server, "brief").status_code,
    ]  # fmt: skip
    assert [] == list(folder.iterdir())


def test_a_list_is_fetched_again_only_when_it_has_changed(serve: Serve, folder: Path) -> None:
    """By its ETag."""
    server = running(serve, folder)
    tag = server.client.get(PATH).headers["etag"]
    unchanged = server.client.get(PATH, headers={"If-None-Match": tag}).status_code
    put(server, "brief", vector())

    assert [304, 200] == [unchanged, server.client.get(PATH, headers={"If-None-Match": tag}).status_code]


@pytest.mark.parametrize(
    ("settings", "key", "status", "code"),
    [
        ({}, "boss", 201, None),
        ({}, "guess", 401, "invalid_api_key"),
        ({}, "", 401, "invalid_api_key"),
        ({"api_keys": SecretStr("user")}, "user", 403, "forbidden"),
        ({"api_keys": SecretStr("user")}, "boss", 201, None),
        ({"api_keys": SecretStr("user")}, "guess", 401, "invalid_api_key"),
        ({"admin_keys": None}, "boss", 403, "forbidden"),
        ({"admin_keys": None}, "", 403, "forbidden"),
        ({"admin_keys": None, "api_keys": SecretStr("user")}, "user", 403, "forbidden"),
    ],
)
def test_only_an_admin_key_changes_anything(
    serve: Serve, folder: Path, settings: dict[str, Any], key: str, status: int, code: str | None
) -> None:
    """401 for no key or a wrong one, 403 for an ordinary one; without admin keys the routes are closed to all."""
    server = running(serve, folder, **settings)

    answers = [put(server, "brief", vector(), key), delete(server, "brief", key)]

    if code is None:
        assert [201, 200] == [answer.status_code for answer in answers]
    else:
        assert [(status, code)] * 2 == [(a.status_code, a.json()["error"]["code"]) for a in answers]
        assert not folder.exists()


def test_admin_keys_alone_leave_the_server_open(serve: Serve, folder: Path) -> None:
    """They guard what changes the server; with API keys set they open what those open."""
    open_server = running(serve, folder)
    closed = running(serve, folder, api_keys=SecretStr("user"))

    assert [200, 200] == [open_server.chat().status_code, open_server.client.get(PATH).status_code]
    assert 401 == closed.client.get(PATH).status_code
    for key in ("user", "boss"):
        assert 200 == closed.client.get(PATH, headers={"Authorization": f"Bearer {key}"}).status_code


def test_one_secret_is_not_both_kinds_of_key(tmp_path: Path) -> None:
    """Told at start, as is an admin setting without a key."""
    empty = tmp_path / "keys"
    empty.write_text("# none yet\n")
    both = Settings(api_keys=SecretStr("a,b"), admin_keys=SecretStr("b"))

    for settings in (both, Settings(admin_keys=SecretStr(" ")), Settings(admin_keys_file=empty)):
        with pytest.raises(StartError):
            load_keys(settings)
    assert [False, True] == [
        key.admin for key in load_keys(Settings(api_keys=SecretStr("a"), admin_keys=SecretStr("b")))
    ]


@pytest.mark.parametrize(
    ("name", "body", "headers", "status", "code", "words"),
    [
        ("Brief", vector(), {}, 400, "invalid_steering", "name must match"),
        ("%00", vector(), {}, 400, "invalid_steering", "name must match"),
        ("x" * 300, vector(), {}, 400, "invalid_steering", "name must match"),
        ("..%2f..%2fetc%2fpasswd", vector(), {}, 404, "route_not_found", ""),
        ("brief", b"", {}, 400, "invalid_steering", "safetensors"),
        ("brief", b"\x80\x04]\x94.", {}, 400, "invalid_steering", "safetensors"),
        ("brief", (2**62).to_bytes(8, "little") + b"{}", {}, 400, "invalid_steering", "safetensors"),
        ("brief", vector(float("nan")), {}, 400, "invalid_steering", "NaN"),
        ("brief", vector(layer=6), {}, 400, "invalid_steering", "layers are 0 to 5"),
        ("brief", vector(), {"Content-Type": "application/json"}, 415, "unsupported_media_type", "safetensors"),
        ("brief", vector(), {"Content-Encoding": "gzip"}, 415, "unsupported_media_type", "uncompressed"),
        ("brief", b"\0" * 5 * 2**20, {}, 413, "body_too_large", "4194304 bytes"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_what_is_no_vector_is_refused(
    serve: Serve, folder: Path, name: str, body: bytes, headers: dict[str, str], status: int, code: str, words: str
) -> None:
    """With the reason, in the one shape, and nothing on the disk."""
    server = running(serve, folder)

    answer = put(server, name, body, **headers)

    error = answer.json()["error"]
    assert (status, code) == (answer.status_code, error["code"]), error
    assert words in error["message"]
    assert not folder.exists()
    assert [] == server.client.get(PATH).json()["data"]


def test_a_disk_that_fails_is_the_operators_business(serve: Serve, folder: Path) -> None:
    """507 without a path; the registry is as it was."""
    folder.write_text("a file where the folder should be")
    server = running(serve, folder)

    answer = put(server, "brief", vector())

    assert (507, "storage_failed") == (answer.status_code, answer.json()["error"]["code"])
    assert str(folder) not in answer.text
    assert [] == server.client.get(PATH).json()["data"]


def test_a_server_that_cannot_steer_has_no_vectors(serve: Serve) -> None:
    """The list is empty; every other route says why."""
    server = serve(ScriptedEngine(["a"]), admin_keys=SecretStr("boss"))

    assert [] == server.client.get(PATH).json()["data"]
    for answer in (server.client.get(f"{PATH}/brief"), put(server, "brief", vector()), delete(server, "brief")):
        assert (400, "invalid_steering") == (answer.status_code, answer.json()["error"]["code"])


@pytest.mark.parametrize(("name", "words"), [("breif", "Did you mean 'brief'?"), ("x", "Available: brief.")])
def test_an_unknown_vector_is_404_with_what_there_is(serve: Serve, folder: Path, name: str, words: str) -> None:
    """The nearest name, if one is near."""
    server = running(serve, folder)
    put(server, "brief", vector())

    error = server.client.get(f"{PATH}/{name}").json()["error"]

    assert "vector_not_found" == error["code"]
    assert words in error["message"]
