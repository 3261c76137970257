"""What an engine cannot do is told beforehand: in discovery, to clients before a stream, to operators at start."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from thinkserve.server.deployment import Deployment, Local
from thinkserve.server.model_dir import ModelDir, StartError
from thinkserve.server.preflight import check_names
from thinkserve.server.roles import Roles
from thinkserve.server.settings import Preset, Settings
from thinkserve.server.testing import ScriptedBackend
from thinkserve.strategies.controls import Guide
from thinkserve.strategies.testing import ScriptedEngine

Serve = Callable[..., Any]
PRESETS = {"short": Preset(strategy="budget-guidance", params={"budget": 40}), "plain": Preset(strategy="single"),
           "open": Preset(strategy="budget-guidance")}  # fmt: skip


def guided(serve: Serve, *, guides: bool) -> Any:
    """A server on a model with a budget predictor or without."""
    engine = ScriptedEngine(["hm</think>4"])
    return serve(engine, ScriptedBackend(engine, guides=guides), presets=PRESETS)


def strategy(**params: Any) -> dict[str, Any]:
    """The body's choice of budget guidance."""
    return {"name": "budget-guidance", "params": params}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "body", [{"strategy": strategy(budget=40)}, {"model": "m:short"}, {"strategy": "open", "thinking_token_budget": 9}]
)
def test_a_model_without_predictor_refuses_guidance_before_anything_runs(
    serve: Serve, body: dict[str, Any], stream: bool
) -> None:
    """By whatever name it is asked for; a stream gets its 400 in place of a 200."""
    server = guided(serve, guides=False)

    answer = server.chat(**body, stream=stream)

    error = answer.json()["error"]
    assert (400, "strategy_unavailable", "strategy") == (answer.status_code, error["code"], error["param"])
    assert "`thinkserve budget train`" in error["message"]
    assert [] == server.engine.history


def test_discovery_tells_whether_the_model_can_be_guided(serve: Serve) -> None:
    """The strategy with the reason, and presets of it as models only where they run."""
    without, able = guided(serve, guides=False), guided(serve, guides=True)

    cards = [server.client.get("/v1/strategies/budget-guidance").json() for server in (without, able)]
    models = [[card["id"] for card in s.client.get("/v1/models").json()["data"]] for s in (without, able)]

    assert [False, True] == [card["available"] for card in cards]
    assert "`thinkserve budget train`" in cards[0]["unavailable_reason"]
    assert [["budget_predictor"]] * 2 == [card["requires"] for card in cards]
    assert [["m", "m:plain"], ["m", "m:short", "m:plain", "m:open"]] == models


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("body", "headers", "param"),
    [
        ({"strategy": "budget-guidance"}, {}, "strategy.params.budget"),
        ({"strategy": strategy(slack=0.5), "thinking_token_budget": -1}, {}, "strategy.params.budget"),
        ({"strategy": "budget-guidance", "reasoning_effort": "none"}, {}, "strategy.params.budget"),
        ({}, {"X-Reasoning-Strategy": "budget-guidance"}, "X-Reasoning-Strategy.budget"),
        ({"model": "m:open"}, {}, "thinking_token_budget"),
    ],
)
def test_a_missing_budget_is_told_with_its_place(
    serve: Serve, body: dict[str, Any], headers: dict[str, str], param: str, stream: bool
) -> None:
    """Before the stream begins; who takes a preset cannot set its parameters, so the request's own field is named."""
    server = guided(serve, guides=True)
    chat = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": stream, **body}

    answer = server.client.post("/v1/chat/completions", json=chat, headers=headers)

    error = answer.json()["error"]
    assert (400, "missing_field", param) == (answer.status_code, error["code"], error["param"])
    assert [] == server.engine.history


@pytest.mark.parametrize(
    ("body", "budget"),
    [
        ({"strategy": strategy(budget=40)}, 40),
        ({"strategy": strategy(budget=40), "thinking_token_budget": 90}, 40),
        ({"strategy": "budget-guidance", "thinking_token_budget": 90}, 90),
        ({"model": "m:open", "thinking_token_budget": 0}, 1),
    ],
)
def test_a_budget_of_either_kind_is_enough(serve: Serve, body: dict[str, Any], budget: int) -> None:
    """The strategy's own comes first."""
    server = guided(serve, guides=True)

    answer = server.chat(**body)

    assert 200 == answer.status_code, answer.text
    assert (Guide(budget),) == server.engine.history[0].job.controls


def test_several_models_can_be_guided_where_the_target_can() -> None:
    """A predictor belongs to the model that answers."""
    target, helper = (ScriptedBackend(ScriptedEngine([]), guides=guides) for guides in (False, True))

    assert [False, True] == [Roles(one, {"guide": other}).guides for one, other in ((target, helper), (helper, target))]


def deployed(folder: Path) -> Deployment:
    """A model alone, in a folder that holds an unfinished training but no predictor."""
    (folder / "budget").mkdir()
    (folder / "budget" / "traces.jsonl").write_text("{}")
    return Deployment((Local(("target",), ModelDir(folder, "Qwen3ForCausalLM", 1), "m"),))


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        (Settings(default_strategy="budget-guidance"), "default_strategy"),
        (Settings(default_strategy="short", presets=PRESETS), "default_strategy"),
        (Settings(effort_map={"low": "open"}, presets=PRESETS), "effort_map.low"),
    ],
)
def test_what_clients_get_unasked_must_be_able_to_run(tmp_path: Path, settings: Settings, where: str) -> None:
    """Told at start, in one line with the way out; with a predictor, the model's or a configured one, it starts."""
    without = deployed(tmp_path)

    with pytest.raises(StartError, match=rf"^{where}: budget-guidance is not available: .*`thinkserve budget train`"):
        check_names(settings, without)
    check_names(settings.model_copy(update={"budget_predictor": tmp_path}), without)
    (tmp_path / "budget" / "predictor.json").write_text("{}")
    check_names(settings, without)


def test_presets_that_nobody_gets_unasked_may_wait_for_their_predictor(tmp_path: Path) -> None:
    """They are not offered; the server starts."""
    check_names(Settings(presets=PRESETS), deployed(tmp_path))


def test_steering_that_is_switched_off_is_no_default(tmp_path: Path) -> None:
    """The same rule, the other need."""
    presets = {"brief": Preset(strategy="steering", params={"vector": "brief"})}
    settings = Settings(default_strategy="brief", presets=presets, steering=False)

    with pytest.raises(StartError, match="default_strategy: steering is not available: the engine does not steer"):
        check_names(settings, deployed(tmp_path))
