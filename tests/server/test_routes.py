"""The discovery routes over ASGI: status, body and headers; chat has its tests on real sockets."""

from __future__ import annotations

from collections.abc import Mapping

import httpx
import pytest

from thinkserve.server import __version__
from thinkserve.server.app import create_app
from thinkserve.server.settings import Settings
from thinkserve.server.testing import ScriptedBackend
from thinkserve.strategies import registry
from thinkserve.strategies.testing import ScriptedEngine

pytestmark = pytest.mark.anyio


async def get(path: str, headers: Mapping[str, str] = {}) -> httpx.Response:
    app = create_app(Settings(), ScriptedBackend(ScriptedEngine([])))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
        return await client.get(path, headers=headers)


@pytest.mark.parametrize("path", ["/v1/strategies", "/v1/strategies/single", "/v1/strategies/short-m@k"])
async def test_a_client_that_has_the_document_is_told_so(path: str) -> None:
    """ETag and If-None-Match, weak and listed tags included."""
    first = await get(path)
    assert first.status_code == 200
    tag = first.headers["etag"]
    for known in (tag, f"W/{tag}", f'"other", {tag}', "*"):
        again = await get(path, {"If-None-Match": known})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
    assert (await get(path, {"If-None-Match": '"other"'})).status_code == 200


@pytest.mark.parametrize(
    ("headers", "more", "reported"),
    [
        ({}, {}, False),
        ({"X-Reasoning-Strategy": "single"}, {}, True),
        ({}, {"reasoning": {"mode": "single"}}, True),
        ({}, {"strategy": "single"}, True),
    ],
)
async def test_a_plain_answer_is_reported_on_where_its_strategy_was_asked_for(
    headers: Mapping[str, str], more: Mapping[str, object], reported: bool
) -> None:
    """In whatever place; otherwise the response is what OpenAI's would be."""
    app = create_app(Settings(), ScriptedBackend(ScriptedEngine(["t</think>a"])))
    body = {"model": "scripted", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 9, **more}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
        answer = await client.post("/v1/chat/completions", json=body, headers=headers)
    assert (200, reported) == (answer.status_code, "strategy" in answer.json())


async def test_models_and_strategies_are_listed() -> None:
    """Presets among the models, every registered strategy among the strategies."""
    models, strategies = (await get("/v1/models")).json(), (await get("/v1/strategies")).json()
    assert [card["id"] for card in models["data"]] == ["scripted", *(f"scripted:{name}" for name in Settings().presets)]
    assert [card["id"] for card in strategies["data"]] == registry.names()
    alone = (await get("/v1/models/scripted:race")).json()
    created = {"created": alone["created"]}  # of each server its own: when it was started
    assert alone in [card | created for card in models["data"]]


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("/v1/models/nope", "model_not_found"),
        ("/v1/models/a/b:race", "model_not_found"),
        ("/v1/strategies/sigle", "unknown_strategy"),
        ("/v1/nothing", "route_not_found"),
    ],
)
async def test_what_is_not_there_is_404_in_the_one_shape(path: str, code: str) -> None:
    """OpenAI's error object with our code."""
    response = await get(path)
    assert (response.status_code, response.json()["error"]["code"]) == (404, code)


async def test_the_version_is_the_packages() -> None:
    """As vLLM's route of that name."""
    assert (await get("/version")).json() == {"version": __version__}
