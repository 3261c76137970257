"""What extraction and calibration measure on: a real engine, steered by vectors that nobody else ever sees."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from anyio.from_thread import BlockingPortal
from torch import Tensor

from thinkserve.server.model_dir import MODELS, check_model
from thinkserve.server.settings import Settings
from thinkserve.server.vectors import SteeringVector, VectorRegistry, shape_of
from thinkserve.server.vectors_writer import EngineWriter, started
from thinkserve.server.vllm_engine import VllmBackend, VllmEngine
from thinkserve.steering.extract import sign_check, to_tensors
from thinkserve.steering.model import Model
from thinkserve.steering.questions import from_tasks
from thinkserve.strategies.controls import Steer
from thinkserve.strategies.engine import Job, Sampling, Tokens
from thinkserve.strategies.errors import TooLong

PROMPTS = [[10, 11, 12, 13], list(range(20, 60)), [10, 11, 12, 13]]


@pytest.fixture(scope="module")
def vector(make_vector: Callable[..., SteeringVector]) -> SteeringVector:
    return make_vector("known", 1, (2, 4))


@pytest.fixture(scope="module")
def tensors(vector: SteeringVector) -> dict[int, Tensor]:
    return to_tensors(vector.layers)


@pytest.fixture(scope="module")
def writer(backend: VllmBackend, portal: BlockingPortal) -> EngineWriter:
    return EngineWriter(backend, portal)


def tokens(writer: EngineWriter, vectors: dict[int, Tensor], scale: float, **more: float) -> list[list[int]]:
    written = writer.write(PROMPTS, vectors, scale, most=24, **more)  # type: ignore[arg-type]
    return [each.tokens for each in written]


def test_what_is_written_is_what_a_request_gets(
    portal: BlockingPortal,
    backend: VllmBackend,
    writer: EngineWriter,
    vector: SteeringVector,
    tensors: dict[int, Tensor],
) -> None:
    """A greedy job of the engine that names a registered vector of the same numbers."""

    async def request(prompt: list[int]) -> Tokens:
        engine = VllmEngine(backend, backend.renderer, "request", None, {"known": vector})
        job = Job(tuple(prompt), 24, Sampling(temperature=0.0), controls=(Steer("known", 0.7),))
        async with engine.generate(job) as stream:
            return tuple([token async for delta in stream for token in delta.tokens])

    served = [list(portal.call(request, prompt)) for prompt in PROMPTS]

    assert served == tokens(writer, tensors, 0.7)


def test_a_trial_leaves_nothing_behind(backend: VllmBackend, writer: EngineWriter, tensors: dict[int, Tensor]) -> None:
    """Not in the registry, not in later calls, and its place in the worker is free to go."""
    registered = dict(backend.vectors.snapshot()) if backend.vectors else {}

    before, during, after = (tokens(writer, tensors, scale) for scale in (0.0, 1.0, 0.0))
    other = tokens(writer, {3: torch.ones(128)}, 1.0)

    assert before == after
    assert 3 == len({str(each) for each in (before, during, other)})
    assert backend.vectors is not None
    assert registered == dict(backend.vectors.snapshot())
    assert {0} == set(backend._loaded.users.values())


def test_each_prompt_has_a_seed_of_its_own(writer: EngineWriter) -> None:
    """The same again for the same seed; equal prompts of a call differ, and so does another seed."""
    first, again, other = (tokens(writer, {}, 0.0, temperature=1.0, seed=seed) for seed in (1, 1, 2))

    assert first == again != other
    assert first[0] != first[2]


def test_a_prompt_that_does_not_fit_is_told(backend: VllmBackend, writer: EngineWriter) -> None:
    """As one error, whatever else was under way."""
    with pytest.raises(TooLong, match=f"the model's context is {backend.info.context}"):
        writer.write([[5], [5] * backend.info.context])


@pytest.mark.vllm
@pytest.mark.slow
def test_the_shipped_vector_points_the_right_way() -> None:
    """Made for these weights; at its calibrated scale thoughts are shorter, and away from it longer."""
    large = check_model(MODELS / "arith-large")
    shape = shape_of(large)
    vector = VectorRegistry(large.path / "vectors", shape).snapshot()["brief"]

    with started(Settings(model=str(large.path), kv_cache_gib=0.1, steering=True)) as writer:
        model = Model(large.path, device="cpu")
        prompts = [model.prompt(question.text) for question in from_tasks("medium", 6, 5, held_out=True)]
        found = sign_check(writer, prompts, to_tensors(vector.layers), vector.about["calibration"]["scale"], most=600)

    assert shape.fingerprint == vector.model_fingerprint
    assert found["ok"], found
    assert found["tokens"]["plus"] <= 0.5 * found["tokens"]["zero"]
