"""steering: the single chain, with one control on it."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from thinkserve.strategies.controls import Steer
from thinkserve.strategies.engine import Task
from thinkserve.strategies.steering import SteeringOptions
from thinkserve.strategies.testing import ScriptedEngine, play

pytestmark = pytest.mark.anyio


async def test_it_is_single_with_a_vector() -> None:
    """Same job but for the control, same answer, same pieces."""
    plain, steered = ScriptedEngine(["ab</think>c"]), ScriptedEngine(["ab</think>c"])
    task = Task(plain.encode("q<think>"), 99)

    expected = await play("single", plain, task)
    actual = await play("steering", steered, task, vector="brief", scale=-0.5, layers=(3,), positions="thinking")

    assert (expected[0], expected[1].pieces) == (actual[0], actual[1].pieces)
    assert [(Steer("brief", -0.5, (3,), "thinking"),)] == [stream.job.controls for stream in steered.history]


async def test_it_tells_which_vector_is_at_work() -> None:
    """One event, before the first token."""
    engine = ScriptedEngine(["ab</think>c"])

    _, out = await play("steering", engine, Task(engine.encode("q<think>"), 99), vector="brief")

    assert ["steer.applied", "chain.started", "chain.finished"] == [event.type for event in out.events]
    assert {"vector": "brief", "scale": 1.0} == out.events[0].data


async def test_what_it_will_do_is_known_beforehand() -> None:
    """The control is declared, so that the server can check it before it admits the request."""
    assert (Steer("brief", 2.0),) == SteeringOptions(vector="brief", scale=2.0).controls()


@pytest.mark.parametrize("scale", [10.5, -11.0, float("nan"), float("inf")])
async def test_a_scale_is_finite_and_bounded(scale: float) -> None:
    """Up to ten times the raw vector."""
    with pytest.raises(ValidationError):
        SteeringOptions(vector="brief", scale=scale)
