"""Steering on a real engine: what a job asks for happens to its own rows, exactly, and to nobody else's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import anyio
import pytest
import torch
from anyio.from_thread import BlockingPortal
from prometheus_client import REGISTRY
from torch import Tensor
from transformers import AutoModelForCausalLM

from thinkserve.server import vllm_launch
from thinkserve.server.model_dir import find_model
from thinkserve.server.settings import Settings
from thinkserve.server.vectors import SteeringVector
from thinkserve.server.vllm_controls import Steered, steering
from thinkserve.server.vllm_engine import VllmBackend, VllmEngine, create
from thinkserve.strategies.chain import continued
from thinkserve.strategies.controls import Positions, Steer
from thinkserve.strategies.engine import Delta, Job, ModelInfo, Sampling, Tokens
from thinkserve.strategies.streams import whole

# float32 on both sides; logits are of the order of 10.
CLOSE_ENOUGH = 2e-4

Run = Callable[..., Any]
Vectors = Mapping[str, SteeringVector]


@pytest.fixture(scope="module")
def vectors(make_vector: Callable[..., SteeringVector]) -> Vectors:
    """Two vectors of one layer, one of two layers; strong enough to change what is said."""
    made = (make_vector("a", 1, (2,)), make_vector("b", 2, (4,)), make_vector("wide", 3, (1, 5), 0.5))
    return {vector.name: vector for vector in made}


@pytest.fixture(scope="module")
def model() -> Any:
    """The same model in transformers."""
    return AutoModelForCausalLM.from_pretrained(find_model(None).path, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def small(portal: BlockingPortal) -> Iterator[VllmBackend]:
    """An engine with 640 tokens of cache: a few sequences of 150 tokens and it must preempt."""
    backend = portal.call(create, Settings(dtype="float32", kv_cache_gib=21 * 32 * 3072 / 2**30, max_model_len=256))
    yield backend
    portal.call(backend.aclose)


@pytest.fixture(scope="module")
def plain(portal: BlockingPortal) -> Iterator[VllmBackend]:
    """vLLM with its own worker and scheduler."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm_launch, "extend", lambda config: setattr(config, "additional_config", {}))
        backend = portal.call(create, Settings(dtype="float32", kv_cache_gib=0.05, steering=False))
    assert "thinkserve" not in backend._llm.vllm_config.parallel_config.worker_cls
    yield backend
    portal.call(backend.aclose)


def greedy(info: ModelInfo, *, thinking: bool = False) -> Sampling:
    """Always the likeliest token, never an end; with `thinking` no tag either. Log-probabilities know nothing of it."""
    banned = (*info.eos, *info.think_open, *info.think_close) if thinking else info.eos
    return Sampling(temperature=0.0, logit_bias=tuple((token, -100.0) for token in banned))


def job(backend: VllmBackend, *prompt: int, tokens: int = 24, **more: Any) -> Job:
    """A greedy job of exactly `tokens` tokens."""
    return Job(prompt, tokens, greedy(backend.info), logprobs=0, **more)


def asked(backend: VllmBackend, jobs: list[Job], vectors: Vectors) -> list[Steered]:
    """What the controls of the jobs mean."""
    return [steering(each, backend.info, vectors) for each in jobs]


def forward(model: Any, ids: Tokens, spans: list[tuple[SteeringVector, float, int, int]]) -> Tensor:
    """Log-probabilities [tokens, vocabulary] of transformers, hooks that add vectors at positions start to stop."""

    def hook(layer: int, module: Any, inputs: Any, output: Any) -> Any:
        hidden = output if isinstance(output, Tensor) else output[0]
        for vector, scale, start, stop in spans:
            if layer in vector.layers:
                hidden[:, start:stop] += scale * torch.tensor(vector.layers[layer].tolist())
        return output

    with ExitStack() as hooks, torch.inference_mode():
        for layer, block in enumerate(model.model.layers):
            hooks.callback(block.register_forward_hook(partial(hook, layer)).remove)
        return torch.log_softmax(model(torch.tensor([ids])).logits[0], dim=-1)


def truth(model: Any, job: Job, tokens: Tokens, vectors: Vectors, close: Tokens) -> list[float]:
    """What transformers says of a job's tokens."""
    ids, begin = job.prompt + tokens, len(job.prompt) - 1
    spans = []
    for control in job.controls:
        assert isinstance(control, Steer)
        ended = ids.index(close[0], begin + 1) if close[0] in tokens and control.positions == "thinking" else len(ids)
        vector = vectors[control.vector]
        some = {layer: vector.layers[layer] for layer in control.layers or vector.layers}
        spans.append((replace(vector, layers=some), control.scale, begin, ended))
    logprobs = forward(model, ids, spans)
    return [float(logprobs[begin + n, token]) for n, token in enumerate(tokens)]


def mixed(backend: VllmBackend) -> list[Job]:
    """Jobs of every kind: unsteered, one vector, several, some layers, both signs, long prompts, thinking only."""
    opened = backend.info.think_open
    thinking: Positions = "thinking"
    return [
        job(backend, *range(10, 30)),
        job(backend, *range(10, 30), controls=(Steer("a", 1.0),)),
        job(backend, *range(30, 63), controls=(Steer("b", -2.0), Steer("a", 0.5), Steer("a", 0.25))),
        job(backend, 5, controls=(Steer("wide", 1.0),)),
        job(backend, *range(40, 72), controls=(Steer("wide", 1.0, layers=(5,)),)),
        job(backend, *(20 + n % 50 for n in range(2500)), controls=(Steer("a", 1.0),)),
        job(backend, 9, 8, *opened, thinking_budget=6, controls=(Steer("a", 1.0, positions=thinking), Steer("b", 1.0))),
        job(backend, 9, 7, *opened, controls=(Steer("b", 1.0, positions=thinking),)),
    ]


def test_log_probabilities_equal_those_of_a_forward_hook(
    portal: BlockingPortal, backend: VllmBackend, run_batch: Run, vectors: Vectors, model: Any
) -> None:
    """All in one batch; the prompt of 2,500 tokens is computed in pieces."""
    jobs = mixed(backend)
    ran = portal.call(run_batch, backend, jobs, asked(backend, jobs, vectors))

    assert all(len(each.tokens) == 24 for each in ran)
    assert backend.info.think_close[0] in ran[6].tokens
    for each, found in zip(jobs, ran, strict=True):
        expected = truth(model, each, found.tokens, vectors, backend.info.think_close)
        assert pytest.approx(expected, abs=CLOSE_ENOUGH) == list(found.logprobs)


def test_the_hook_and_the_vectors_make_a_difference(
    portal: BlockingPortal, backend: VllmBackend, run_batch: Run, vectors: Vectors, model: Any
) -> None:
    """The test above can fail: without its controls each steered job is far from what the engine said."""
    jobs = mixed(backend)
    ran = portal.call(run_batch, backend, jobs, asked(backend, jobs, vectors))
    bare = [
        truth(model, replace(each, controls=()), found.tokens, vectors, (0,))
        for each, found in zip(jobs, ran, strict=True)
    ]
    apart = [
        max(abs(a - b) for a, b in zip(one, found.logprobs, strict=True)) for one, found in zip(bare, ran, strict=True)
    ]

    assert [False] + [True] * 7 == [distance > 0.05 for distance in apart]


def test_unsteered_rows_keep_their_bits_whatever_the_neighbours_do(
    portal: BlockingPortal, backend: VllmBackend, run_batch: Run, vectors: Vectors
) -> None:
    """The same batch with every second job steered and with none: the others' log-probabilities are equal."""
    bare = [job(backend, *range(10 + n, 20 + 2 * n)) for n in range(12)]
    some = [
        replace(each, controls=(Steer("a", 3.0), Steer("wide", -1.0)) if n % 2 else ()) for n, each in enumerate(bare)
    ]
    portal.call(run_batch, backend, some[1:2], asked(backend, some[1:2], vectors))

    quiet = portal.call(run_batch, backend, bare)
    loud = portal.call(run_batch, backend, some, asked(backend, some, vectors))

    assert quiet[::2] == loud[::2]
    assert all(a != b for a, b in zip(quiet[1::2], loud[1::2], strict=True))


def test_unsteered_requests_equal_those_of_an_engine_without_steering(
    portal: BlockingPortal, backend: VllmBackend, plain: VllmBackend, run_batch: Run
) -> None:
    """Bit by bit, in eager mode."""
    jobs = [job(backend, *range(10 + n, 20 + 2 * n)) for n in range(12)]

    assert portal.call(run_batch, plain, jobs) == portal.call(run_batch, backend, jobs)


def test_fifty_different_steerings_in_one_batch_equal_their_solo_runs(
    portal: BlockingPortal,
    backend: VllmBackend,
    run_batch: Run,
    vectors: Vectors,
    make_vector: Callable[..., SteeringVector],
) -> None:
    """Fifty vectors over one prompt, beside one that all share; most of them change its greedy tokens."""
    many = {f"v{n}": make_vector(f"v{n}", 100 + n, (n % 6,)) for n in range(50)}
    jobs = [
        job(backend, *range(10, 40), tokens=10, controls=(Steer(name, 0.3 * (n - 25)), Steer("b", 0.1 * n)))
        for n, name in enumerate(many)
    ]
    steered = asked(backend, jobs, {**vectors, **many})

    async def solo() -> list[Tokens]:
        return [(await run_batch(backend, [one], [how]))[0].tokens for one, how in zip(jobs, steered, strict=True)]

    together = [ran.tokens for ran in portal.call(run_batch, backend, jobs, steered)]

    assert portal.call(solo) == together
    assert len(set(together)) > 10


def test_steering_survives_preemption(
    portal: BlockingPortal, backend: VllmBackend, small: VllmBackend, run_batch: Run, vectors: Vectors, model: Any
) -> None:
    """Eight sequences of 150 tokens in a cache of 640: what is thrown out and computed again is steered again."""
    opened = backend.info.think_open
    controls = (Steer("a", 1.0),), (Steer("wide", -1.0), Steer("b", 1.0)), (Steer("a", 1.0, positions="thinking"),), ()
    jobs = [
        job(small, *range(10 + n, 40 + n), *opened, tokens=110, thinking_budget=30, controls=controls[n % 4])
        for n in range(8)
    ]
    before = preemptions()

    ran = portal.call(run_batch, small, jobs, asked(small, jobs, vectors))

    assert preemptions() > before
    for each, found in zip(jobs, ran, strict=True):
        expected = truth(model, each, found.tokens, vectors, backend.info.think_close)
        assert pytest.approx(expected, abs=CLOSE_ENOUGH) == list(found.logprobs)


def preemptions() -> float:
    """vLLM's own count, over all engines of this process."""
    samples = [sample for family in REGISTRY.collect() for sample in family.samples]
    return sum(sample.value for sample in samples if sample.name == "vllm:num_preemptions_total")


def test_a_chain_keeps_the_steering_that_its_tokens_were_written_under(
    portal: BlockingPortal, backend: VllmBackend, vectors: Vectors, model: Any
) -> None:
    """Segments under other controls, injected tokens between them: each row stays as it was, and is cached so."""
    engine = VllmEngine(backend, backend.renderer, "chain", "chain", vectors)
    prompt = tuple(range(10, 50))
    whole = Job(prompt, 200, greedy(backend.info), logprobs=0, controls=(Steer("a", 1.0),))

    async def scenario() -> tuple[Tokens, list[float], int]:
        async with engine.chain(whole) as chain:
            for controls in (None, None, (Steer("b", -1.0),)):
                async with chain.segment(20, controls=controls) as stream:
                    deltas = [delta async for delta in stream]
                if controls is None:
                    chain.inject((7, 7) if len(chain.tokens) > 20 else ())
            return chain.tokens, [each for delta in deltas for each in delta.logprobs], stream.cached

    tokens, logprobs, cached = portal.call(scenario)

    ids = prompt + tokens
    spans = [(vectors["a"], 1.0, 39, 80), (vectors["b"], -1.0, 81, len(ids))]
    expected = [float(row[token]) for row, token in zip(forward(model, ids, spans)[81:], ids[82:], strict=False)]
    assert pytest.approx(expected, abs=CLOSE_ENOUGH) == logprobs
    assert cached == 64


def test_a_job_that_goes_on_is_under_the_steering_of_what_was_written(
    portal: BlockingPortal, backend: VllmBackend, vectors: Vectors, model: Any
) -> None:
    """As the steps of a tree are: jobs of their own, which find what was written as it was, and cached so."""
    engine = VllmEngine(backend, backend.renderer, "steps", "steps", vectors)
    prompt = tuple(range(10, 50))
    step = Job(prompt, 40, greedy(backend.info), logprobs=0, controls=(Steer("a", 1.0),))

    async def write(job: Job) -> tuple[Delta, int]:
        async with engine.generate(job) as stream:
            return await whole(stream), stream.cached

    written = portal.call(write, step)[0].tokens
    more, cached = portal.call(write, continued(step, written))

    ids = prompt + written + more.tokens
    rows = forward(model, ids, [(vectors["a"], 1.0, 39, len(ids))])[len(prompt + written) - 1 :]
    expected = [float(row[token]) for row, token in zip(rows, more.tokens, strict=False)]
    assert pytest.approx(expected, abs=CLOSE_ENOUGH) == more.logprobs
    assert cached == 64


def test_nothing_is_left_of_a_request_that_was_abandoned(
    portal: BlockingPortal, backend: VllmBackend, run_batch: Run, vectors: Vectors
) -> None:
    """Aborted in the middle: the worker forgets it at its next step, and its vectors are free to go."""
    endless = job(backend, *range(10, 20), tokens=3000, controls=(Steer("a", 1.0, positions="thinking"),))

    async def scenario() -> dict[str, int]:
        engine = VllmEngine(backend, backend.renderer, "left", None, vectors)
        with anyio.fail_after(60):
            async with engine.generate(endless) as stream:
                await anext(aiter(stream))
                assert 1 in backend._loaded.users.values()
        await run_batch(backend, [job(backend, 5, 6)])
        (state,) = await backend._call_steering("state")
        return dict(state)

    state = portal.call(scenario)

    assert {"requests": 0, "rows": 0, "thinking": 0} == {name: state[name] for name in ("requests", "rows", "thinking")}
    assert {0} == set(backend._loaded.users.values())
