"""vLLM's model runner V2, the default on GPUs, steers as V1 does: here on the CPU, its Triton kernels interpreted.

The other runner is chosen by the environment before vLLM is imported, so it runs in a child: this file as a program.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from array import array
from dataclasses import astuple
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
from thinkserve.strategies.controls import Steer
from thinkserve.strategies.engine import Job, Sampling

TIMEOUT = 600


def vectors() -> dict[str, SteeringVector]:
    """A vector of two layers for the embedded model."""
    draw = Random(3)
    numbers = {layer: array("f", (draw.gauss(0, 0.7) for _ in range(128))) for layer in (1, 4)}
    views = {layer: memoryview(each).cast("B").cast("f") for layer, each in numbers.items()}
    return {"v": SteeringVector("v", 1, "content", 128, views, {1: 1.0, 4: 1.0}, {})}


async def scenario(backend: VllmBackend) -> list[dict[str, Any]]:
    """Jobs side by side: unsteered, steered, several on some layers, only while thinking; two ask for statistics."""
    bias = tuple((token, -100.0) for token in backend.info.eos)
    greedy, opened = Sampling(temperature=0.0, logit_bias=bias), backend.info.think_open
    jobs = [
        Job(tuple(range(10, 50)), 10, greedy, logprobs=0),
        Job(tuple(range(10, 50)), 10, greedy, logprobs=0, controls=(Steer("v", 1.0),), stats=True),
        Job((9, 8, 7), 10, greedy, logprobs=0, controls=(Steer("v", -1.0, (4,)), Steer("v", 0.5))),
        Job((5, *opened), 10, greedy, logprobs=0, thinking_budget=4, controls=(Steer("v", positions="thinking"),)),
        Job((7, *opened), 10, greedy, logprobs=0, stats=True),
    ]
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


async def child() -> None:
    """The scenario as JSON, and whether it was V2 that ran it."""
    from thinkserve.server.settings import Settings
    from thinkserve.server.vllm_engine import create

    # Its top-p kernel does not run in Triton's interpreter.
    setattr(VllmBackend, "warm_up", no_warm_up)  # noqa: B010 -- mypy forbids the plain form
    backend = await create(Settings(kv_cache_gib=0.05, max_model_len=256))
    try:
        print(json.dumps([backend._llm.vllm_config.use_v2_model_runner, await scenario(backend)]))
    finally:
        await backend.aclose()


@pytest.mark.slow
def test_model_runner_v2_steers_as_v1_does(portal: BlockingPortal, backend: VllmBackend) -> None:
    """The same tokens and log-probabilities, to the precision of float32."""
    env = os.environ | {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-P", __file__]
    ran = subprocess.run(command, env=env, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    was_v2, found = json.loads(ran.stdout.splitlines()[-1])

    expected = portal.call(scenario, backend)

    assert was_v2
    assert [each["tokens"] for each in expected] == [each["tokens"] for each in found]
    for one, other in zip(expected, found, strict=True):
        assert pytest.approx(one["logprobs"], abs=5e-5) == other["logprobs"]
        assert pytest.approx(one["stats"], abs=5e-4) == other["stats"]
    assert [0, 40, 0, 0, 40] == [len(each["stats"]) for each in found]


if __name__ == "__main__":
    import_module("triton.backends").backends["cpu"] = SimpleNamespace(
        driver=SimpleNamespace(is_active=lambda: True), compiler=None
    )
    anyio.run(child)
