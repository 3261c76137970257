"""Three real engines in one process: each serves its roles, counts for itself, and can be lost by itself."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import anyio
import pytest
from anyio.from_thread import BlockingPortal
from prometheus_client import REGISTRY, generate_latest

from tests.engine import tiny_rewards
from tests.strategies.worlds import SMALL
from thinkserve.server.deployment import plan_models
from thinkserve.server.errors import RoleDown
from thinkserve.server.meter import MeteredEngine
from thinkserve.server.metrics import Metrics
from thinkserve.server.model_dir import MODELS
from thinkserve.server.roles import Roles, create
from thinkserve.server.settings import Settings
from thinkserve.strategies import registry
from thinkserve.strategies.engine import Answer, Job, Path, Role, Sampling, Task
from thinkserve.strategies.testing import Recorder, example

WRITERS: dict[Role, str] = {"target": "small", "guide": "arith-large", "verifier": "arith-large"}
QUESTION = "Start with 17. Add 25. Multiply by 3. What is the result?"


@pytest.fixture(scope="module")
def roles(portal: BlockingPortal, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Roles]:
    """A deployment as the command line makes it: two writers and a small reward model, for four roles."""
    large = str(MODELS / "arith-large")
    prm = tiny_rewards.make(tmp_path_factory.mktemp("prm"), "Qwen3ForTokenClassification").folder
    settings = Settings(
        model=str(MODELS / "arith-small"), guide=large, verifier=large, reward=str(prm), kv_cache_gib=0.05,
        role_kv_gib={"guide": 0.05, "reward": 0.02}, served_name="small", dtype="float32",
    )  # fmt: skip
    backend = portal.call(create, settings, plan_models(settings, cpu=True))
    yield backend
    portal.call(backend.aclose)


def counted(model: str) -> int:
    """vLLM's count of the tokens that a model generated."""
    return int(REGISTRY.get_sample_value("vllm:generation_tokens_total", {"model_name": model, "engine": "0"}) or 0)


def test_every_model_counts_for_itself(portal: BlockingPortal, roles: Roles) -> None:
    """Jobs of all roles at once: the streams' counts add up to vLLM's of each model, and so does the meter."""
    meter = MeteredEngine(roles.engine("req", "salt"), Metrics())

    async def write(role: Role, tokens: int) -> None:
        prompt = await meter.render([{"role": "user", "content": QUESTION}], role)
        job = Job(prompt, tokens, Sampling(temperature=1.0), seed=tokens, role=role, logprobs=5, chain=tokens)
        async with meter.generate(job) as stream:
            async for delta in stream:
                assert all(len(top) == 5 for top in delta.top)

    async def scenario() -> None:
        async with anyio.create_task_group() as group:
            for tokens in (4, 9, 14):
                for role in WRITERS:
                    group.start_soon(write, role, tokens)
        await anyio.sleep(0.2)

    before = {model: counted(model) for model in set(WRITERS.values())}
    portal.call(scenario)
    spent = {model: counted(model) - before[model] for model in before}

    assert {
        "small": meter.by_role()["target"],
        "arith-large": meter.generated - meter.by_role()["target"],
    } == spent
    assert (3, 3, 3) == tuple(meter.jobs[role] for role in WRITERS)
    assert len(meter.chains) == 3


def test_the_page_of_metrics_shows_all_models(roles: Roles) -> None:
    """One family per name, as Prometheus wants it, and every sample once."""
    lines = generate_latest(REGISTRY).decode().splitlines()
    types = [line.split()[2] for line in lines if line.startswith("# TYPE vllm:")]
    samples = [line.rpartition(" ")[0] for line in lines if line.startswith("vllm:")]

    assert len(types) == len(set(types)) > 20
    assert len(samples) == len(set(samples))
    for name in ("vllm:num_requests_running", "vllm:cache_config_info", "vllm:prompt_tokens_total"):
        shown = [model_of(each) for each in samples if each.startswith(name + "{")]
        assert {"small", "arith-large"} < set(shown)
        assert len(shown) == len(set(shown)) >= 3


def model_of(sample: str) -> str:
    return sample.partition('model_name="')[2].partition('"')[0]


def test_a_reward_model_scores_beside_the_writers(portal: BlockingPortal, roles: Roles) -> None:
    """One batch per expansion; a step that was read is not read again."""

    async def scenario() -> tuple[Any, Any]:
        engine = roles.engine("req", "tree")
        steps = tuple(f"{'17 + 25 = 42. ' * 5}So {n}.\n\n" for n in range(3))
        first = await engine.score(QUESTION, [Path(steps[:1]), Path(steps[1:2])])
        then = await engine.score(QUESTION, [Path((steps[0], each), 1) for each in steps])
        return first, then

    first, then = portal.call(scenario)
    assert [1, 1, 1, 1, 1] == [len(each.rewards) for each in (*first, *then)]
    assert all(0 <= reward <= 1 for each in (*first, *then) for reward in each.rewards)
    assert all(each.cached > 60 for each in then)


@pytest.mark.parametrize("name", [name for name in registry.names() if name != "steering"])
def test_every_strategy_runs_on_real_models_and_is_accounted_for(
    portal: BlockingPortal, roles: Roles, name: str
) -> None:
    """What it says of its tokens is what vLLM counted for each model, and nothing of it lives on."""
    entry, meter, out = registry.get(name), MeteredEngine(roles.engine(f"req-{name}", "salt"), Metrics()), Recorder()
    given = {"k": 3, "m": 1, "budget": 20} | SMALL.get(name, {})
    options = example(entry, **{key: given[key] for key in given.keys() & entry.options.model_fields.keys()})

    async def scenario() -> Answer:
        prompt = await roles.render([{"role": "user", "content": QUESTION}])
        task = Task(prompt.tokens, 64, Sampling(1.0), phase=prompt.phase, seed=7, question=QUESTION, interval=16)
        answer = await entry.run(task, meter, out, options)
        await anyio.sleep(0.2)
        return answer

    before = {model: counted(model) for model in set(WRITERS.values())}
    answer = portal.call(scenario)
    spent = {model: counted(model) - before[model] for model in before}

    assert out.tokens == answer.tokens
    assert 0 < len(answer.tokens) <= 64
    target = meter.by_role()["target"]
    assert {"small": target, "arith-large": meter.generated - target} == spent
    served: dict[Role, Any] = dict(roles.roles)
    assert [] == [role for role, model in served.items() if model.unfinished]


def test_a_helper_that_is_killed_takes_its_roles_and_nothing_else(portal: BlockingPortal, roles: Roles) -> None:
    """Guide and verifier are gone, target and reward model answer; the end of the test closes what is left."""

    async def write(role: Role) -> int:
        async with roles.engine("req").generate(Job((5, 6, 7), 8, role=role)) as stream:
            return len([token async for delta in stream for token in delta.tokens])

    async def lose() -> None:
        guide: Any = roles.roles["guide"]
        os.kill(guide._llm.engine_core.resources.engine_manager.processes[0].pid, signal.SIGKILL)
        with anyio.fail_after(20):
            while guide.alive:
                await anyio.sleep(0.05)

    portal.call(lose)
    for role in ("guide", "verifier"):
        with pytest.raises(RoleDown, match=role):
            portal.call(write, role)
    assert roles.alive
    assert portal.call(write, "target") > 0
    assert 1 == len(portal.call(lambda: roles.engine("req").score(QUESTION, [Path(("a\n\n",))])))
    assert {"target": True, "guide": False, "verifier": False, "reward": True} == {
        role: model.alive for role, model in roles.roles.items()
    }
