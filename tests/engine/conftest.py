"""One real vLLM for the whole test session, on an event loop of its own in a thread.

A test takes `backend` and `portal`, writes its scenario as an async function and runs it with `portal.call(scenario)`.
A live HTTP server over the same engine runs on the same loop: `portal.start_task_soon(uvicorn_server.serve)`.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from random import Random

import anyio
import pytest
from anyio.from_thread import BlockingPortal, start_blocking_portal

from thinkserve.server.settings import Settings
from thinkserve.server.vectors import SteeringVector
from thinkserve.server.vllm_controls import NOTHING, Steered
from thinkserve.server.vllm_engine import VllmBackend, create
from thinkserve.strategies.engine import Job, Tokens


@pytest.fixture(scope="session")
def portal() -> Iterator[BlockingPortal]:
    """The way into the engine's event loop."""
    with start_blocking_portal("asyncio") as portal:
        yield portal


@pytest.fixture(scope="session")
def backend(portal: BlockingPortal) -> Iterator[VllmBackend]:
    """The embedded model on vLLM, started once; 65 thousand tokens of cache and more are plenty for tests."""
    backend = portal.call(create, Settings(dtype="float32", kv_cache_gib=0.25))
    yield backend
    portal.call(backend.aclose)


@pytest.fixture(scope="session")
def counted(backend: VllmBackend) -> Callable[[], int]:
    """vLLM's own count of generated tokens: the Prometheus counter of this engine, over all requests so far."""
    from thinkserve.server.vllm_metrics import KEPT

    def read() -> int:
        mine = [each for logger in backend._llm.logger_manager.stat_loggers for each in KEPT._engines.get(logger, ())]
        samples = [sample for collector in mine for family in collector.collect() for sample in family.samples]
        return int(sum(sample.value for sample in samples if sample.name == "vllm:generation_tokens_total"))

    return read


@pytest.fixture(scope="session")
def make_vector() -> Callable[..., SteeringVector]:
    """Makes steering vectors for the embedded model: normal numbers of the given size on the given layers."""

    def make(
        name: str, seed: int, layers: tuple[int, ...] = (3,), size: float = 1.0, hidden: int = 128
    ) -> SteeringVector:
        draw = Random(seed)
        numbers = {layer: array("f", (draw.gauss(0, size) for _ in range(hidden))) for layer in layers}
        content = hashlib.sha256(b"".join(bytes([n]) + each.tobytes() for n, each in numbers.items())).hexdigest()
        views = {layer: memoryview(each).toreadonly().cast("B").cast("f") for layer, each in numbers.items()}
        return SteeringVector(name, 1, content, hidden, views, dict.fromkeys(layers, size * hidden**0.5), {})

    return make


@dataclass(frozen=True, slots=True)
class Ran:
    """What came of a job: its tokens, their log-probabilities, and how many prompt tokens the cache knew."""

    tokens: Tokens
    logprobs: tuple[float, ...]
    cached: int


@pytest.fixture(scope="session")
def run_batch() -> Callable[..., Awaitable[list[Ran]]]:
    """Runs jobs that enter the engine in one step, in the order given, each under its steering or none."""
    serial = count()

    async def run(
        backend: VllmBackend, jobs: Sequence[Job], steered: Sequence[Steered] = (), salt: str | None = None
    ) -> list[Ran]:
        found: dict[int, Ran] = {}
        own = f"run-{next(serial)}" if salt is None else salt

        async def one(index: int, entered: anyio.Event) -> None:
            steering = steered[index] if steered else NOTHING
            async with backend.open(f"{own}-{index}", own, jobs[index], steering) as stream:
                entered.set()
                deltas = [delta async for delta in stream]
            tokens = tuple(token for delta in deltas for token in delta.tokens)
            found[index] = Ran(tokens, tuple(each for delta in deltas for each in delta.logprobs), stream.cached)

        await backend._llm.pause_generation(mode="keep", clear_cache=False)
        try:
            async with anyio.create_task_group() as group:
                for index in range(len(jobs)):
                    entered = anyio.Event()
                    group.start_soon(one, index, entered)
                    await entered.wait()
                await backend._llm.resume_generation()
        finally:
            await backend._llm.resume_generation()
        return [found[index] for index in range(len(jobs))]

    return run
