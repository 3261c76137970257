"""The ways in which GPUs run a model give what the eager one gives: compiled, and by vLLM's model runner V2.

On this CPU Inductor writes C++, and V2's Triton kernels are interpreted. Both are chosen before vLLM is imported, so
each runs in a child: this file as a program.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from array import array
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, replace
from importlib import import_module
from random import Random
from types import SimpleNamespace
from typing import Any

import anyio
import pytest
from anyio.from_thread import BlockingPortal

from thinkserve.server.vectors import SteeringVector
from thinkserve.server.vllm_controls import steering
from thinkserve.server.vllm_engine import VllmBackend
from thinkserve.strategies.controls import Guide, Steer
from thinkserve.strategies.engine import Job, Sampling

TIMEOUT = 600
COMPILED = {"TORCHDYNAMO_DISABLE": "0"}


def vectors() -> dict[str, SteeringVector]:
    """A vector of two layers for the embedded model."""
    draw = Random(3)
    numbers = {layer: array("f", (draw.gauss(0, 0.7) for _ in range(128))) for layer in (1, 4)}
    views = {layer: memoryview(each).cast("B").cast("f") for layer, each in numbers.items()}
    return {"v": SteeringVector("v", 1, "content", 128, views, {1: 1.0, 4: 1.0}, {})}


async def scenario(backend: VllmBackend, *, plain: bool = False) -> list[dict[str, Any]]:
    """Jobs side by side: unsteered, steered, several on some layers, only while thinking, guided; two ask for stats.

    `plain`: only those without controls.
    """
    bias = tuple((token, -100.0) for token in backend.info.eos)
    greedy, opened = Sampling(temperature=0.0, logit_bias=bias), backend.info.think_open
    jobs = [
        Job(tuple(range(10, 50)), 10, greedy, logprobs=0),
        Job(tuple(range(10, 50)), 10, greedy, logprobs=0, controls=(Steer("v", 1.0),), stats=True),
        Job((9, 8, 7), 10, greedy, logprobs=0, controls=(Steer("v", -1.0, (4,)), Steer("v", 0.5))),
        Job((5, *opened), 10, greedy, logprobs=0, thinking_budget=4, controls=(Steer("v", positions="thinking"),)),
        Job((7, *opened), 10, greedy, logprobs=0, stats=True),
        Job((11, *opened), 10, greedy, logprobs=0, controls=(Guide(5),)),
    ]
    jobs = [replace(job, stats=False) for job in jobs if not job.controls] if plain else jobs
    found: list[dict[str, Any]] = [{} for _ in jobs]

    async def run(index: int) -> None:
        steered = steering(jobs[index], backend.info, vectors())
        async with backend.open(f"v2-{index}", "v2", jobs[index], steered) as stream:
            deltas = [delta async for delta in stream]
        tokens = [token for delta in deltas for token in delta.tokens]
        logprobs = [each for delta in deltas for each in delta.logprobs]
        stats = [number for delta in deltas for each in delta.stats for number in astuple(each)]
        found[index] = {"tokens": tokens, "logprobs": logprobs, "stats": stats}

    async with anyio.create_task_group() as group:
        for index in range(len(jobs)):
            group.start_soon(run, index)
    return found


async def no_warm_up(backend: VllmBackend) -> None:
    """Nothing."""


async def child(runner: str) -> None:
    """The scenario as JSON, and how it was run."""
    from thinkserve.server.settings import Settings
    from thinkserve.server.vllm_engine import create

    if runner == "V2":
        # Its top-p kernel does not run in Triton's interpreter.
        setattr(VllmBackend, "warm_up", no_warm_up)  # noqa: B010 -- mypy forbids the plain form
    settings = Settings(dtype="float32", kv_cache_gib=0.05, max_model_len=256, enforce_eager=runner == "V2")
    changes = {"steering": runner != "bare", "steering_exact": runner == "exact"}
    backend = await create(settings.model_copy(update=changes))
    try:
        config = backend._llm.vllm_config
        how = {"V2": config.use_v2_model_runner, "compiled": bool(config.compilation_config.mode)}
        print(json.dumps([how, await scenario(backend, plain=runner in ("exact", "bare"))]))
    finally:
        await backend.aclose()


@pytest.fixture(scope="module")
def expected(portal: BlockingPortal, backend: VllmBackend) -> list[dict[str, Any]]:
    """What the eager engine makes of the scenario."""
    found: list[dict[str, Any]] = portal.call(scenario, backend)
    return found


def ran(runner: str, environment: dict[str, str]) -> Any:
    """How a child ran the scenario, and what came of it."""
    env = os.environ | environment | {"PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-P", __file__, runner]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_compiled_without_fusing_unsteered_requests_keep_their_bits() -> None:
    """Those of a compiled engine that has no steering at all: steering is one op there, and rows of nobody pass it."""
    with ThreadPoolExecutor(2) as pool:
        (how, exact), (as_well, bare) = pool.map(lambda runner: ran(runner, COMPILED), ("exact", "bare"))

    assert {"V2": False, "compiled": True} == how == as_well
    assert 2 == len(exact)
    assert [(each["tokens"], each["logprobs"]) for each in bare] == [(x["tokens"], x["logprobs"]) for x in exact]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("runner", "environment"),
    [("V2", {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}), ("compiled", COMPILED)],
)
def test_other_runners_do_as_the_eager_one(
    expected: list[dict[str, Any]], runner: str, environment: dict[str, str]
) -> None:
    """The same tokens and log-probabilities, to the precision of float32, statistics too."""
    how, found = ran(runner, environment)

    assert {"V2": runner == "V2", "compiled": runner == "compiled"} == how
    assert [each["tokens"] for each in expected] == [each["tokens"] for each in found]
    for one, other in zip(expected, found, strict=True):
        assert pytest.approx(one["logprobs"], abs=5e-5) == other["logprobs"]
        assert pytest.approx(one["stats"], abs=5e-4) == other["stats"]
    assert [0, 40, 0, 0, 40, 0] == [len(each["stats"]) for each in found]


if __name__ == "__main__":
    if sys.argv[1] == "V2":
        import_module("triton.backends").backends["cpu"] = SimpleNamespace(
            driver=SimpleNamespace(is_active=lambda: True), compiler=None
        )
    anyio.run(child, sys.argv[1])
