"""The engine that serves, as the Writer of `thinkserve vectors`: what is measured here is what will be served.

It is started once and lives on an event loop in a thread; the caller stays synchronous. A vector on trial goes along
with its jobs and is in no registry, so nothing is left of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count

from anyio.from_thread import BlockingPortal, start_blocking_portal

from thinkserve.server import logs
from thinkserve.server.settings import Settings
from thinkserve.server.vectors import SteeringVector
from thinkserve.server.vllm_engine import VllmBackend, VllmEngine, create
from thinkserve.steering.extract import to_layers
from thinkserve.steering.vector_file import VectorFile
from thinkserve.steering.writer import Vectors, Written, split
from thinkserve.strategies.controls import Steer
from thinkserve.strategies.engine import Job, Sampling, Tokens
from thinkserve.strategies.seeds import chain_seed
from thinkserve.strategies.streams import whole
from thinkserve.strategies.together import together

TRIAL = "trial"


@contextmanager
def started(settings: Settings) -> Iterator[EngineWriter]:
    """A writer on an engine of these settings, which is stopped at the end. Raises StartError."""
    logs.hush_vllm()
    with start_blocking_portal("asyncio") as portal:
        backend = portal.call(create, settings)
        try:
            yield EngineWriter(backend, portal)
        finally:
            portal.call(backend.aclose)


class EngineWriter:
    """A Writer on a running engine; `portal` leads to the engine's event loop."""

    def __init__(self, backend: VllmBackend, portal: BlockingPortal) -> None:
        self._backend, self._portal = backend, portal
        self._calls = count()

    def write(
        self,
        prompts: Sequence[list[int]],
        vectors: Vectors | None = None,
        scale: float = 0.0,
        *,
        temperature: float = 0.0,
        seed: int = 0,
        most: int = 1024,
    ) -> list[Written]:
        """See Writer. All are submitted at once, and the engine runs as many as it is set to. Raises ReasoningError."""
        trial = {TRIAL: _vector(vectors)} if vectors and scale else {}
        controls = (Steer(TRIAL, scale),) if trial else ()
        jobs = [
            Job(tuple(prompt), most, Sampling(temperature), chain_seed(seed, index), controls=controls)
            for index, prompt in enumerate(prompts)
        ]
        engine = VllmEngine(self._backend, self._backend.renderer, f"write-{next(self._calls)}", None, trial)
        info = self._backend.info
        close = info.think_close[0] if len(info.think_close) == 1 else None
        return [split(tokens, close, info.eos) for tokens in self._portal.call(_run, engine, jobs)]


async def _run(engine: VllmEngine, jobs: Sequence[Job]) -> list[Tokens]:
    async def one(job: Job) -> Tokens:
        async with engine.generate(job) as stream:
            return (await whole(stream)).tokens

    return await together(one, jobs)


def _vector(vectors: Vectors) -> SteeringVector:
    file = VectorFile(to_layers(vectors))
    return SteeringVector(TRIAL, 1, file.id, file.hidden, file.layers, file.norms, file.about)
