"""The first request that a model is served before the server is ready."""

from __future__ import annotations

from typing import Any, cast

import pytest

from thinkserve.server import vllm_engine
from thinkserve.server.deployment import Local
from thinkserve.server.model_dir import StartError
from thinkserve.server.settings import Settings
from thinkserve.strategies.errors import BadOptions

pytestmark = pytest.mark.anyio


class Llm:
    """An engine that notes its end."""

    def __init__(self) -> None:
        self.ended = False

    def shutdown(self, timeout: float) -> None:
        self.ended = True


class Mute:
    """A model that cannot be asked anything."""

    async def warm_up(self) -> None:
        raise BadOptions("The model has no chat template.")


async def test_a_model_that_fails_its_first_request_is_a_start_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one line that names it; no engine is left."""
    llms = [Llm(), Llm()]
    model = cast(Any, None)
    places = [Local(("target",), model, "a"), Local(("reward",), model, "b")]

    async def serve(*_: Any) -> Mute:
        return Mute()

    monkeypatch.setattr(vllm_engine, "open_registry", lambda *_: None)
    monkeypatch.setattr(vllm_engine, "launch", lambda *_: llms)
    monkeypatch.setattr(vllm_engine, "_serve", serve)

    with pytest.raises(StartError, match=r"^[ab] does not answer: The model has no chat template\.$"):
        await vllm_engine.start(Settings(), places)
    assert [True, True] == [llm.ended for llm in llms]
