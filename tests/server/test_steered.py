"""Steering as a modifier: any strategy, every job of it, and every mistake told before anything runs."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from thinkserve.server.protocol import MAX_STEERS
from thinkserve.server.steered import ControlledEngine
from thinkserve.server.testing import ScriptedBackend
from thinkserve.server.vectors import Shape, VectorRegistry
from thinkserve.server.vllm_controls import COLUMNS
from thinkserve.steering.vector_file import VectorFile, serialize, view
from thinkserve.strategies.controls import Steer
from thinkserve.strategies.engine import Job
from thinkserve.strategies.testing import SCRIPTED, ScriptedEngine

Serve = Callable[..., Any]
BRIEF, CALM = Steer("brief", 0.5), Steer("calm", -1.0)


@pytest.fixture
def registry(tmp_path: Path) -> VectorRegistry:
    """`brief` for layers 2 and 4, made for the served model; `calm` for layer 1, made for another."""
    numbers = view(array("f", [1.0, 2.0]).tobytes())
    registry = VectorRegistry(tmp_path, Shape(hidden=2, layers=6, fingerprint="mine"))
    registry.put("brief", serialize(VectorFile({2: numbers, 4: numbers}, {"model_fingerprint": "mine"})))
    registry.put("calm", serialize(VectorFile({1: numbers}, {"model_fingerprint": "other"})))
    return registry


def steered(serve: Serve, registry: VectorRegistry | None, *scripts: str) -> Any:
    engine = ScriptedEngine(scripts or ["hm</think>4"])
    return serve(engine, ScriptedBackend(engine, vectors=registry))


@pytest.mark.parametrize(
    ("name", "params", "chains"), [("single", {}, 1), ("majority", {"k": 3}, 3), ("short-m-at-k", {"k": 3, "m": 1}, 3)]
)
def test_every_chain_of_any_strategy_is_steered(
    serve: Serve, registry: VectorRegistry, name: str, params: dict[str, Any], chains: int
) -> None:
    """In the order given, also jobs that settle a race; the report repeats it."""
    server = steered(serve, registry)
    steer = [{"vector": "brief", "scale": 0.5}, {"vector": "calm", "scale": -1, "positions": "thinking"}]

    answer = server.chat(max_tokens=99, strategy={"name": name, "params": params, "steer": steer})

    assert 200 == answer.status_code, answer.text
    assert chains <= len(server.engine.history)
    assert {(BRIEF, Steer("calm", -1.0, (), "thinking"))} == {s.job.controls for s in server.engine.history}
    report = answer.json()["strategy"]
    assert [("brief", 0.5, []), ("calm", -1, [])] == [(s["vector"], s["scale"], s["layers"]) for s in report["steer"]]
    assert ["steering vector 'calm' was made for another model"] == report["warnings"]


def test_without_the_modifier_nothing_is_steered(serve: Serve, registry: VectorRegistry) -> None:
    """Also when the list is empty; the report does not mention it."""
    server = steered(serve, registry)

    answers = [server.chat(strategy={"name": "single"}), server.chat(strategy={"name": "single", "steer": []})]

    assert [200, 200] == [answer.status_code for answer in answers]
    assert {()} == {stream.job.controls for stream in server.engine.history}
    assert all("steer" not in answer.json()["strategy"] for answer in answers)


def test_the_strategy_steers_one_chain(serve: Serve, registry: VectorRegistry) -> None:
    """Its own vector first, then the modifier's."""
    server = steered(serve, registry)
    params = {"vector": "brief", "scale": 0.25, "layers": [4], "positions": "thinking"}

    answer = server.chat(strategy={"name": "steering", "params": params, "steer": [{"vector": "calm"}]})

    assert 200 == answer.status_code, answer.text
    assert [(Steer("brief", 0.25, (4,), "thinking"), Steer("calm", 1.0))] == [
        stream.job.controls for stream in server.engine.history
    ]


@pytest.mark.parametrize(
    ("steer", "code", "param", "words"),
    [
        ({"vector": "breif"}, "invalid_steering", "strategy.steer.1.vector", "Did you mean 'brief'?"),
        ({"vector": "../brief"}, "invalid_steering", "strategy.steer.1.vector", "Unknown steering vector"),
        ({"vector": "x" * 10**5}, "invalid_steering", "strategy.steer.1.vector", "Available: brief, calm."),
        ({"vector": "brief", "scale": 10.5}, "invalid_steering", "strategy.steer.1.scale", "between -10 and 10"),
        ({"vector": "brief", "scale": -1e300}, "invalid_steering", "strategy.steer.1.scale", "between -10 and 10"),
        ({"vector": "brief", "scale": "1"}, "invalid_type", "strategy.steer.1.scale", "number"),
        (
            {"vector": "brief", "layers": [2, 3]},
            "invalid_steering",
            "strategy.steer.1.layers",
            "no layer 3; its layers: 2",
        ),
        ({"vector": "brief", "layers": [-1]}, "invalid_steering", "strategy.steer.1.layers", "no layer -1"),
        ({"vector": "brief", "layers": [2, 2]}, "invalid_steering", "strategy.steer.1.layers", "each layer once"),
        ({"vector": "brief", "positions": "all"}, "value_out_of_range", "strategy.steer.1.positions", "thinking"),
        ({"vectr": "brief"}, "unknown_parameter", "strategy.steer.1.vectr", "Did you mean 'vector'?"),
        ({}, "missing_field", "strategy.steer.1.vector", "Missing"),
        ("brief", "invalid_type", "strategy.steer.1", ""),
    ],
)
def test_a_mistake_is_told_with_its_place(
    serve: Serve, registry: VectorRegistry, steer: Any, code: str, param: str, words: str
) -> None:
    """A 400 before the engine hears of the request."""
    server = steered(serve, registry)

    answer = server.chat(strategy={"name": "single", "steer": [{"vector": "brief"}, steer]})

    error = answer.json()["error"]
    assert (400, code, param) == (answer.status_code, error["code"], error["param"]), error
    assert words in error["message"]
    assert [] == server.engine.history


@pytest.mark.parametrize(
    ("params", "code", "param"),
    [
        ({"vector": "breif"}, "invalid_steering", "strategy.params.vector"),
        ({"vector": "brief", "layers": [0]}, "invalid_steering", "strategy.params.layers"),
        ({"vector": "brief", "scale": 11}, "value_out_of_range", "strategy.params.scale"),
        ({}, "missing_field", "strategy.params.vector"),
    ],
)
def test_the_strategys_own_vector_is_checked_too(
    serve: Serve, registry: VectorRegistry, params: dict[str, Any], code: str, param: str
) -> None:
    """In the same words, at its parameters."""
    server = steered(serve, registry)

    error = server.chat(strategy={"name": "steering", "params": params}).json()["error"]

    assert (code, param, []) == (error["code"], error["param"], server.engine.history)


def test_so_many_vectors_act_on_one_chain(serve: Serve, registry: VectorRegistry) -> None:
    """As many as the worker has places for a row; the strategy's own counts."""
    server = steered(serve, registry)
    four = [{"vector": "brief"}] * MAX_STEERS

    def ask(steer: list[dict[str, str]], **strategy: Any) -> Any:
        return server.chat(strategy={"steer": steer, **strategy})

    own = {"name": "steering", "params": {"vector": "brief"}}
    enough, many, with_own = ask(four, name="single"), ask([*four, four[0]], name="single"), ask(four, **own)

    assert COLUMNS == MAX_STEERS
    assert 200 == enough.status_code
    assert ("value_out_of_range", "strategy.steer") == tuple(many.json()["error"][key] for key in ("code", "param"))
    assert ("invalid_steering", "strategy.steer") == tuple(with_own.json()["error"][key] for key in ("code", "param"))


def test_steering_while_thinking_needs_a_model_that_marks_it(serve: Serve, registry: VectorRegistry) -> None:
    """Where the engine could not tell the end, the request is refused."""
    engine = ScriptedEngine(["4"], info=replace(SCRIPTED, think_open=(), think_close=()))
    server = serve(engine, ScriptedBackend(engine, vectors=registry))
    steer = [{"vector": "brief", "positions": "thinking"}]

    error = server.chat(strategy={"name": "single", "steer": steer}).json()["error"]

    assert ("invalid_steering", "strategy.steer.0.positions") == (error["code"], error["param"])


def test_an_engine_that_cannot_steer_says_so(serve: Serve, registry: VectorRegistry) -> None:
    """A modifier cannot be honoured, a strategy is not available, and discovery says why."""
    plain, able = steered(serve, None), steered(serve, registry)
    modifier = plain.chat(strategy={"name": "single", "steer": [{"vector": "brief"}]}).json()["error"]
    strategy = plain.chat(strategy={"name": "steering", "params": {"vector": "brief"}}).json()["error"]

    supports = [s.client.get("/v1/strategies/majority").json()["supports"]["steer"] for s in (plain, able)]
    cards = [s.client.get("/v1/strategies/steering").json() for s in (plain, able)]

    assert (modifier["code"], modifier["message"]) == ("invalid_steering", "The engine of this server does not steer.")
    assert (strategy["code"], strategy["param"]) == ("strategy_unavailable", "strategy")
    assert cards[0]["unavailable_reason"] in strategy["message"]
    assert [False, True] == supports == [card["available"] for card in cards]
    assert ["the engine does not steer", None] == [card["unavailable_reason"] for card in cards]
    assert [["hidden_states"]] * 2 == [card["requires"] for card in cards]


def test_a_running_request_keeps_its_vector(serve: Serve, registry: VectorRegistry) -> None:
    """What is deleted while a chain runs is gone for the next request only."""
    server = steered(serve, registry, "t" * 50 + "</think>4")
    body = {"strategy": {"name": "single", "steer": [{"vector": "brief"}]}, "stream": True}

    with server.client.stream("POST", "/v1/chat/completions", json=_body(**body)) as answer:
        lines = answer.iter_lines()
        next(lines)
        registry.delete("brief")
        rest = list(lines)

    assert "data: [DONE]" in rest
    assert "brief" in server.chat(strategy=body["strategy"]).json()["error"]["message"]


def _body(**extra: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": "hi"}], **extra}


@pytest.mark.anyio
async def test_segments_of_a_chain_are_steered_whatever_they_set() -> None:
    """Those without controls of their own take the chain's; both come before the modifier's."""
    inner = ScriptedEngine(["abcdef"])
    engine = ControlledEngine(inner, (BRIEF,))
    job = Job(engine.encode("q"), max_tokens=9, controls=(CALM,))

    async with engine.chain(job) as chain:
        for controls in (None, (), (BRIEF, CALM)):
            async with chain.segment(2, controls=controls) as stream:
                async for _ in stream:
                    pass

    assert [(CALM, BRIEF), (BRIEF,), (BRIEF, CALM, BRIEF)] == [stream.job.controls for stream in inner.history]


@pytest.mark.anyio
async def test_other_models_are_left_alone() -> None:
    """A vector belongs to the target model: neither jobs nor chains of another role get it."""
    inner = ScriptedEngine(["ab"], roles=("target", "guide"))
    engine = ControlledEngine(inner, (BRIEF,))
    job = Job(engine.encode("q"), max_tokens=9, role="guide")

    @asynccontextmanager
    async def segment() -> Any:
        async with engine.chain(job) as chain, chain.segment(2) as stream:
            yield stream

    for opened in (engine.generate(job), segment()):
        async with opened as stream:
            async for _ in stream:
                pass

    assert [(), ()] == [stream.job.controls for stream in inner.history]
