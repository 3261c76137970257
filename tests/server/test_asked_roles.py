"""Models that only some parameters of a strategy need: refused by the parameter's name, before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from thinkserve.server.deployment import Deployment, Local
from thinkserve.server.model_dir import ModelDir, StartError
from thinkserve.server.preflight import check_names
from thinkserve.server.settings import Preset, Settings
from thinkserve.strategies.testing import ScriptedEngine

Serve = Callable[..., Any]
PRESETS = {"weighed": Preset(strategy="particle", params={"weights": "odds"})}


@pytest.mark.parametrize("stream", [False, True])
def test_rewards_without_a_reward_model_are_refused_by_name(serve: Serve, stream: bool) -> None:
    """Before a stream has begun; who asks for none is served."""
    server = serve(ScriptedEngine(["t</think>7"]))

    def ask(**params: str) -> Any:
        return server.chat(stream=stream, max_tokens=60, strategy={"name": "particle", "params": {"n": 2, **params}})

    error = ask(weights="odds").json()["error"]
    assert ("strategy_unavailable", "strategy.params.weights") == (error["code"], error["param"])
    assert "reward" in error["message"]
    assert [] == server.engine.history
    assert 200 == ask().status_code == ask(weights="self").status_code


def test_the_place_that_asked_is_named_whatever_it_is(serve: Serve) -> None:
    """A header, or the preset whose parameters the client cannot see."""
    server = serve(ScriptedEngine(["t</think>7"]), presets=PRESETS)
    body = {"messages": [{"role": "user", "content": "hi"}]}
    header = {"X-Reasoning-Strategy": "particle; weights=softmax"}

    first = server.client.post("/v1/chat/completions", json={"model": "m", **body}, headers=header)
    second = server.client.post("/v1/chat/completions", json={"model": "m:weighed", **body})

    params = [answer.json()["error"]["param"] for answer in (first, second)]
    assert ["X-Reasoning-Strategy.weights", "model"] == params
    assert [400, 400] == [first.status_code, second.status_code]


@pytest.mark.parametrize("roles", [("target",), ("target", "reward")])
def test_what_clients_get_unasked_must_have_its_models(roles: Any, tmp_path: Path) -> None:
    """Told at the start, in one line."""
    settings = Settings(default_strategy="weighed", presets=PRESETS)
    deployment = Deployment((Local(roles, ModelDir(tmp_path, "Qwen3ForCausalLM", 1), "m"),))

    if "reward" in roles:
        check_names(settings, deployment)
    else:
        with pytest.raises(StartError, match="default_strategy needs a model that is not configured: reward"):
            check_names(settings, deployment)
