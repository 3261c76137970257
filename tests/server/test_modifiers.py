"""Modifiers below a strategy: asked for over HTTP, checked before anything runs, counted by the meter below them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from thinkserve.server import discovery
from thinkserve.server.choice import Choice
from thinkserve.server.errors import RoleFailed
from thinkserve.server.metrics import Metrics
from thinkserve.server.plan import Plan
from thinkserve.server.protocol import MAX_OVER
from thinkserve.server.request_log import RequestLog
from thinkserve.server.runner import Runner
from thinkserve.server.testing import ScriptedBackend
from thinkserve.strategies import registry
from thinkserve.strategies.engine import Job, Role, Task
from thinkserve.strategies.modifiers import Layer, modifiers
from thinkserve.strategies.testing import Recorder, ScriptedEngine
from thinkserve.strategies.trimr import LEAD, TrimrOptions

Serve = Callable[..., Any]

THOUGHT = "Wait, once more from the very start of it. Now then. So the answer is 7.\n\n"
LOOP = "0123456789abcdef" * 40
GUARD = {"name": "repetition-guard", "params": {"sentence": "Enough."}}
TRIMR = {"name": "trimr", "params": {"mild_room": 20, "sentence": "", "underthinking": False}}


def thinking(script: str, reply: str = "Yes") -> ScriptedEngine:
    """A target with one script, and a verifier that always says the same."""

    def write(job: Job, _: int) -> str:
        return script if job.role == "target" else reply

    return ScriptedEngine(write, roles=("target", "verifier"))


def over(name: str, *layers: dict[str, Any], **params: Any) -> dict[str, Any]:
    return {"name": name, "params": params, "over": list(layers)}


@pytest.mark.parametrize(("name", "params", "chains"), [("single", {}, 1), ("short-m-at-k", {"k": 4, "m": 3}, 4)])
def test_every_chain_of_any_strategy_is_guarded(serve: Serve, name: str, params: dict[str, Any], chains: int) -> None:
    """Thoughts that loop are closed and answered; what we put in is told apart from the generated tokens."""
    server = serve(thinking("So: " + LOOP + "</think>It is 7."))

    answer = server.chat(max_tokens=900, seed=1, strategy=over(name, GUARD, **params))

    assert 200 == answer.status_code, answer.text
    body = answer.json()
    assert "It is 7." == body["choices"][0]["message"]["content"]
    assert body["choices"][0]["message"]["reasoning"].endswith("0123456789abcdef\n\nEnough.\n")
    defaults = modifiers()["repetition-guard"].defaults
    assert [{"name": "repetition-guard", "params": {**defaults, "sentence": "Enough."}}] == body["strategy"]["over"]
    assert server.engine.generated == body["usage"]["completion_tokens"]
    spent = body["usage"]["strategy"]
    assert (chains, len("\n\nEnough.\n") + 1) == (spent["chains"]["started"], spent["injected_tokens"])
    looped = len("So: ") + 4 * 16
    assert looped + len("It is 7.") + 1 == spent["winner_completion_tokens"]
    assert server.engine.generated - spent["winner_completion_tokens"] == spent["wasted_tokens"]


@pytest.mark.parametrize("layers", [(TRIMR,), (TRIMR, GUARD), (GUARD, TRIMR)])
def test_a_race_of_trimmed_chains(serve: Serve, layers: tuple[dict[str, Any], ...]) -> None:
    """short-m@k over TrimR is written nowhere: each chain stops at its third result, and the first ones vote."""
    server = serve(thinking(THOUGHT * 30 + "</think>It is 7."))

    answer = server.chat(max_tokens=9000, seed=3, strategy=over("short-m-at-k", *layers, k=3, m=2))

    assert 200 == answer.status_code, answer.text
    body = answer.json()
    assert {"7": 2} == body["strategy"]["decision"]["votes"]
    assert LEAD in body["choices"][0]["message"]["reasoning"]
    assert body["choices"][0]["message"]["reasoning"].count("So the answer is 7.") <= 4
    assert "It is 7." == body["choices"][0]["message"]["content"]
    assert server.engine.generated == body["usage"]["completion_tokens"]
    assert 3 == body["usage"]["strategy"]["chains"]["started"]
    assert body["usage"]["strategy"]["verifier_calls"] >= 5


def test_the_strategy_and_the_modifier_are_the_same_algorithm(serve: Serve) -> None:
    """`trimr` is `single` over `trimr`, also when streamed."""
    answers = []
    for strategy in ({"name": "trimr", "params": TRIMR["params"]}, over("single", TRIMR)):
        server = serve(thinking(THOUGHT * 30 + "</think>It is 7."))
        body = server.chat(max_tokens=9000, seed=3, strategy=strategy).json()
        message = body["choices"][0]["message"]
        usage = body["usage"]
        spent = [usage["strategy"][name] for name in ("injected_tokens", "winner_completion_tokens", "wasted_tokens")]
        answers.append((message["reasoning"], message["content"], usage["completion_tokens"], spent))

    assert answers[0] == answers[1]
    assert len(LEAD) < answers[0][3][0] < len(LEAD) + 10


def test_events_tell_what_modifiers_do(serve: Serve) -> None:
    """In the stream of those who ask for progress."""
    server = serve(thinking(THOUGHT * 30 + "</think>It is 7."))
    body = {"stream": True, "stream_options": {"include_progress": True}, "max_tokens": 9000, "seed": 1}

    answer = server.chat(strategy=over("single", TRIMR), **body)

    chunks = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    told = [chunk["strategy_event"] for chunk in chunks if "strategy_event" in chunk]
    assert [1, 2, 3] == [event["data"]["thought"] for event in told if event["type"] == "verifier"]
    assert ["mild", "forced"] == [event["data"]["ending"] for event in told if event["type"] == "budget.forced"]
    assert {0} == {event["chain"] for event in told}


@pytest.mark.parametrize(
    ("strategy", "code", "param", "words"),
    [
        (over("single", {"name": "trimer"}), "unknown_modifier", "strategy.over.0.name", "Did you mean 'trimr'?"),
        (over("single", {"name": "x" * 10**5}), "unknown_modifier", "strategy.over.0.name", "Available: repetition-"),
        (over("single", GUARD, {"name": "single"}), "unknown_modifier", "strategy.over.1.name", "Unknown modifier"),
        (over("single", {}), "missing_field", "strategy.over.0.name", "Missing"),
        (over("single", {**GUARD, "parms": {}}), "unknown_parameter", "strategy.over.0.parms", "Did you mean 'params'"),
        (
            over("single", GUARD, {"name": "trimr", "params": {"agrements": 3}}),
            "unknown_parameter",
            "strategy.over.1.params.agrements",
            "Did you mean 'agreements'?",
        ),
        (
            over("single", {"name": "repetition-guard", "params": {"repeats": 1}}),
            "value_out_of_range",
            "strategy.over.0.params.repeats",
            "greater",
        ),
        (over("single", GUARD, GUARD), "value_out_of_range", "strategy.over.1", "once"),
        (over("single", *[GUARD] * (MAX_OVER + 1)), "value_out_of_range", "strategy.over", "at most"),
        ({"name": "single", "over": "trimr"}, "invalid_type", "strategy.over", "list"),
        ({"name": "single", "over": ["trimr"]}, "invalid_type", "strategy.over.0", ""),
        (over("particle", GUARD), "unsupported_parameter", "strategy.over.0", "'particle' takes no modifiers"),
        (over("rap", GUARD, TRIMR), "unsupported_parameter", "strategy.over.1", "'rap' writes each in several jobs"),
    ],
)
def test_a_mistake_is_told_with_its_place(serve: Serve, strategy: Any, code: str, param: str, words: str) -> None:
    """A 400 before the engine hears of the request."""
    server = serve(thinking("t</think>1"))

    answer = server.chat(strategy=strategy)

    error = answer.json()["error"]
    assert (400, code, param) == (answer.status_code, error["code"], error["param"]), error
    assert words in error["message"]
    assert [] == server.engine.history


def test_a_modifier_without_its_model_is_refused_and_not_offered(serve: Serve) -> None:
    """The guard needs none."""
    alone, both = serve(ScriptedEngine(["t</think>1"])), serve(thinking("t</think>1"))

    error = alone.chat(strategy=over("single", GUARD, TRIMR)).json()["error"]
    cards = [server.client.get("/v1/strategies").json() for server in (alone, both)]

    assert ("strategy_unavailable", "strategy.over.1") == (error["code"], error["param"])
    assert "verifier" in error["message"]
    assert [[False], [True]] == [[m["available"] for m in card["modifiers"] if m["id"] == "trimr"] for card in cards]
    offered = [{card["id"]: card["supports"]["over"] for card in each["data"]} for each in cards]
    assert [["repetition-guard"], ["repetition-guard", "trimr"]] == [each["majority"] for each in offered]
    assert [["repetition-guard"]] * 2 == [each["rap"] for each in offered]
    assert [[], []] == [each["particle"] for each in offered]


def test_modifiers_describe_themselves() -> None:
    """Summary, described parameters, defaults that satisfy the schema."""

    class Serving:
        settings: Any = None
        backend = ScriptedBackend(ScriptedEngine([]))

    for entry in modifiers().values():
        card = discovery.modifier_card(Serving(), entry)
        assert card["summary"].endswith(".")
        assert all(each.get("description") for each in card["params_schema"]["properties"].values())
        assert (
            entry.options.model_validate_json(json.dumps(card["defaults"])).model_dump(mode="json") == card["defaults"]
        )


def test_the_header_names_the_strategy_alone(serve: Serve) -> None:
    """A header that agrees with the body is no contradiction to its modifiers."""
    server = serve(thinking("t</think>1"))
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "strategy": over("single", GUARD)}

    answer = server.client.post("/v1/chat/completions", json=body, headers={"X-Reasoning-Strategy": "single"})

    assert 200 == answer.status_code, answer.text
    assert "repetition-guard" == answer.json()["strategy"]["over"][0]["name"]
    assert "single" == answer.headers["X-Reasoning-Strategy"]
    assert "single" == Choice(registry.get("single"), registry.get("single").options(), "").written()


@pytest.mark.anyio
async def test_warnings_of_a_modifier_are_the_answers() -> None:
    """And the meter below counts both models."""
    engine = ScriptedEngine([THOUGHT * 3 + "</think>7"], roles=("target",))
    entry, layer = registry.get("single"), Layer(modifiers()["trimr"], TrimrOptions())
    plan = Plan("r", "m", Task(engine.encode("q<think>"), 900), entry, entry.options(), over=(layer,))
    runner = Runner(ScriptedBackend(engine), Metrics(), RequestLog(False))

    outcome = await runner.run(runner.open(plan), Recorder())

    assert 1 == len(outcome.answer.warnings)
    assert "the verifier failed: no model serves the role 'verifier'" in outcome.answer.warnings[0]
    assert engine.generated == outcome.usage.completion_tokens


@pytest.mark.parametrize("name", ["single", "majority"])
def test_a_verifier_whose_failure_is_to_end_the_request_ends_it_under_any_strategy(serve: Serve, name: str) -> None:
    """A race gets over a chain of its own that fails, but not over this."""
    engine = thinking(THOUGHT * 30 + "</think>It is 7.")
    server = serve(engine)
    plain = engine.render

    async def fails(messages: Any, role: Role = "target") -> Any:
        if role == "verifier":
            raise RoleFailed(role)
        return await plain(messages, role)

    engine.render = fails  # type: ignore[method-assign]
    policy = {"name": "trimr", "params": {"underthinking": False, "on_verifier_error": "fail"}}
    answer = server.chat(max_tokens=9000, seed=3, strategy=over(name, policy))

    assert (502, "verifier_failed") == (answer.status_code, answer.json()["error"]["code"])
    assert [] == engine.live
