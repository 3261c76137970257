"""A request at work: its usage is the engine's, its end has one name, and it is accounted for whatever happens."""

from __future__ import annotations

import json
import logging
from typing import Any

import anyio
import pytest

from thinkserve.server import runner as runner_module
from thinkserve.server.errors import ApiError
from thinkserve.server.metrics import Metrics
from thinkserve.server.plan import Plan
from thinkserve.server.request_log import RequestLog
from thinkserve.server.runner import Runner, usable
from thinkserve.server.testing import ScriptedBackend
from thinkserve.strategies import registry
from thinkserve.strategies.engine import Answer, Emit, Engine, Task
from thinkserve.strategies.errors import BadOptions, EngineFailed
from thinkserve.strategies.registry import Options, Run, Strategy
from thinkserve.strategies.testing import Recorder, ScriptedEngine

pytestmark = pytest.mark.anyio


def make_plan(name: str = "single", options: dict[str, Any] | None = None, **extra: Any) -> Plan:
    entry = registry.get(name)
    task = Task(prompt=(9, 8, 7), max_tokens=1000, seed=1)
    return Plan("req_1", "m", task, entry, entry.options.model_validate(options or {}), **extra)


def plan_of(run: Run, **extra: Any) -> Plan:
    entry = Strategy("mine", "mine", "A strategy of this test.", Options, run)
    return Plan("req_1", "m", Task(prompt=(9,), max_tokens=1000), entry, Options(), **extra)


class Bench:
    """A runner over a scripted engine."""

    def __init__(self, engine: ScriptedEngine, log_json: bool = True) -> None:
        self.engine, self.metrics = engine, Metrics()
        self.runner = Runner(ScriptedBackend(engine), self.metrics, RequestLog(log_json))

    def metric(self, line: str) -> float:
        page = self.metrics.page().decode().splitlines()
        return next((float(each.rpartition(" ")[2]) for each in page if each.startswith(f"thinkserve_{line} ")), 0.0)


async def test_usage_counts_every_chain_and_splits_what_the_client_sees_from_the_rest() -> None:
    """completion = all chains; winner = what was returned; answer = its visible part; wasted = the rest."""
    bench = Bench(ScriptedEngine(["tt</think>\\boxed{7}", "ttttt</think>\\boxed{7}"], overrun=2))
    outcome = await bench.runner.run(bench.runner.open(make_plan("majority", {"k": 2})), Recorder())
    usage = outcome.usage
    assert usage.completion_tokens == bench.engine.generated == 13 + 16
    assert (usage.prompt_tokens, usage.winner_tokens, usage.answer_tokens) == (3, 13, 10)
    assert usage.wasted_tokens == 16
    assert (usage.chains_started, usage.chains_finished, usage.chains_aborted) == (2, 2, 0)
    assert usage.ttft_ms is not None
    assert 0 < usage.ttft_ms <= usage.wall_ms
    assert bench.metric('requests_total{outcome="ok",strategy="majority"}') == 1
    assert bench.metric('tokens_total{kind="wasted",strategy="majority"}') == 16
    assert bench.metric('chains_total{end="won",strategy="majority"}') == 1
    assert bench.metric('chains_total{end="lost",strategy="majority"}') == 1
    assert bench.metric("chains_inflight") == 0
    assert bench.runner.live == 0


async def test_a_request_that_is_cancelled_is_still_accounted_for() -> None:
    """Tokens spent before the client left are counted, the outcome is "aborted", nothing is live."""
    bench = Bench(ScriptedEngine(["t" * 20_000], tick=0.001))
    execution = bench.runner.open(make_plan())
    with anyio.move_on_after(0.1):
        await bench.runner.run(execution, Recorder())
    assert bench.engine.live == []
    assert execution.usage().completion_tokens == bench.engine.generated > 0
    assert bench.metric('requests_total{outcome="aborted",strategy="single"}') == 1
    assert bench.metric('chains_total{end="aborted",strategy="single"}') == 1


async def test_a_deadline_is_an_answer_as_far_as_it_came() -> None:
    """The stream ends with "deadline"; without a visible answer there is nothing usable."""
    bench = Bench(ScriptedEngine(["t" * 20_000], tick=0.001))
    outcome = await bench.runner.run(bench.runner.open(make_plan(timeout_s=0.1)), Recorder())
    assert outcome.answer.finish == "deadline"
    assert not usable(outcome)
    assert bench.metric('requests_total{outcome="deadline",strategy="single"}') == 1
    answering = Bench(ScriptedEngine(["t</think>" + "a" * 20_000], tick=0.001))
    assert usable(await answering.runner.run(answering.runner.open(make_plan(timeout_s=0.1)), Recorder()))


async def test_a_strategy_that_ignores_its_deadline_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the grace it is over, with TimeoutError, whatever it waits for."""

    async def sleeper(task: Task, engine: Engine, emit: Emit, options: Options) -> Answer:
        await anyio.sleep(3600)
        return Answer((), "stop")

    monkeypatch.setattr(runner_module, "GRACE_S", 0.1)
    bench = Bench(ScriptedEngine([""]))
    with anyio.fail_after(5), pytest.raises(TimeoutError):
        await bench.runner.run(bench.runner.open(plan_of(sleeper, timeout_s=0.1)), Recorder())
    assert bench.metric('requests_total{outcome="deadline",strategy="mine"}') == 1


async def test_the_error_of_a_task_group_comes_out_alone() -> None:
    """The caller sees the mistake, not the group it was wrapped in."""

    async def wrong() -> None:
        raise BadOptions("k is odd", "k")

    async def grouped(task: Task, engine: Engine, emit: Emit, options: Options) -> Answer:
        async with anyio.create_task_group() as group:
            group.start_soon(wrong)
        return Answer((), "stop")

    bench = Bench(ScriptedEngine([""]))
    with pytest.raises(BadOptions, match="k is odd"):
        await bench.runner.run(bench.runner.open(plan_of(grouped)), Recorder())
    assert bench.metric('requests_total{outcome="client_error",strategy="mine"}') == 1


async def test_an_engine_failure_is_an_error_and_its_tokens_are_counted() -> None:
    """The chain's end is "error"."""
    bench = Bench(ScriptedEngine(["t" * 50], fail={0: (7, EngineFailed("lost"))}))
    execution = bench.runner.open(make_plan())
    with pytest.raises(EngineFailed):
        await bench.runner.run(execution, Recorder())
    assert execution.usage().completion_tokens == 7
    assert bench.metric('requests_total{outcome="error",strategy="single"}') == 1
    assert bench.metric('chains_total{end="error",strategy="single"}') == 1


async def test_all_requests_can_be_asked_to_decide_or_be_cut_off() -> None:
    """`decide` is a deadline now; `abort` ends in an error that says why."""
    bench, finishes, errors = Bench(ScriptedEngine(["t" * 20_000], tick=0.001)), list[str](), list[str]()

    async def one() -> None:
        try:
            outcome = await bench.runner.run(bench.runner.open(make_plan()), Recorder())
            finishes.append(outcome.answer.finish)
        except ApiError as error:
            errors.append(error.code)

    for act in (bench.runner.decide, bench.runner.abort):
        with anyio.fail_after(5):
            async with anyio.create_task_group() as group:
                group.start_soon(one)
                group.start_soon(one)
                await anyio.sleep(0.05)
                assert bench.runner.live == 2
                act()
    assert finishes == ["deadline"] * 2
    assert errors == ["draining"] * 2
    assert bench.engine.live == []


async def test_one_line_is_logged_per_request_and_holds_no_text(caplog: pytest.LogCaptureFixture) -> None:
    """Ids, counts and times as JSON; neither prompt nor answer."""
    bench = Bench(ScriptedEngine(["secret thought</think>secret answer"]))
    with caplog.at_level(logging.INFO, "thinkserve.request"):
        await bench.runner.run(bench.runner.open(make_plan(), {"client_id": "theirs"}), Recorder())
    (line,) = [record.getMessage() for record in caplog.records]
    fields = json.loads(line)
    assert (fields["id"], fields["client_id"], fields["outcome"]) == ("req_1", "theirs", "ok")
    assert fields["completion_tokens"] == bench.engine.generated
    assert "secret" not in line
