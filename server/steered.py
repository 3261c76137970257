"""Steering as a modifier of any strategy: what a request asks for, checked, and an engine that puts it on every job.

A strategy below it knows nothing of it: short-m@k over steered chains is short-m@k on a ControlledEngine.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace

from thinkserve.server.errors import ApiError, clean
from thinkserve.server.protocol import SteerChoice
from thinkserve.server.validation import nearest
from thinkserve.server.vectors import SteeringVector, VectorRegistry, Vectors
from thinkserve.strategies.around import Around, AroundChain
from thinkserve.strategies.controls import Steer
from thinkserve.strategies.engine import Chain, Control, Engine, Job, ModelInfo, Stream, Tokens


class ControlledEngine(Around):
    """Adds controls to every job and segment of the target model, after those that the strategy has set."""

    def __init__(self, inner: Engine, controls: tuple[Control, ...]) -> None:
        super().__init__(inner)
        self._controls = controls

    def generate(self, job: Job) -> AbstractAsyncContextManager[Stream]:
        """Run a job under the controls."""
        return super().generate(self._with(job))

    @asynccontextmanager
    async def chain(self, job: Job) -> AsyncIterator[Chain]:
        """Open a chain whose segments are under the controls, also those that set their own."""
        async with self._inner.chain(self._with(job)) as chain:
            yield _Controlled(chain, self._controls) if job.role == "target" else chain

    def _with(self, job: Job) -> Job:
        return replace(job, controls=job.controls + self._controls) if job.role == "target" else job


class _Controlled(AroundChain):
    def __init__(self, inner: Chain, controls: tuple[Control, ...]) -> None:
        super().__init__(inner)
        self._controls = controls

    def segment(
        self, max_tokens: int, until: Tokens = (), controls: tuple[Control, ...] | None = None
    ) -> AbstractAsyncContextManager[Stream]:
        given = None if controls is None else controls + self._controls
        return self._inner.segment(max_tokens, until, given)


def to_steers(asked: Iterable[SteerChoice]) -> tuple[Steer, ...]:
    """The controls that the request's `steer` list means."""
    return tuple(Steer(each.vector, each.scale, tuple(each.layers or ()), each.positions) for each in asked)


def check_steer(control: Steer, registry: VectorRegistry | None, info: ModelInfo, where: str) -> SteeringVector:
    """The vector that a control names. ApiError 400 invalid_steering that points below `where`."""
    if registry is None:
        raise invalid("The engine of this server does not steer.", where)
    vectors = registry.snapshot()
    if control.vector not in vectors:
        raise invalid(unknown(control.vector, vectors), f"{where}.vector")
    vector = vectors[control.vector]
    missing = [layer for layer in control.layers if layer not in vector.layers]
    if missing or len(set(control.layers)) < len(control.layers):
        fault = f"has no layer {missing[0]}" if missing else "takes each layer once"
        message = f"Vector {vector.name!r} {fault}; its layers: {', '.join(map(str, vector.layers))}."
        raise invalid(message, f"{where}.layers")
    if control.positions == "thinking" and len(info.think_close) != 1:
        raise invalid("This model does not end its thinking with one token.", f"{where}.positions")
    return vector


def foreign(vector: SteeringVector, registry: VectorRegistry) -> bool:
    """Whether a vector is known to have been made for another model than the one that is served."""
    return bool(vector.model_fingerprint) and vector.model_fingerprint != registry.shape.fingerprint


def unknown(name: str, vectors: Vectors) -> str:
    """What to tell who asks for a vector that is not there."""
    listed = f" Available: {', '.join(sorted(vectors)[:20])}." if vectors else " This server has none."
    return f"Unknown steering vector {clean(name, 64)!r}.{nearest(name, vectors)}{listed}"


def invalid(message: str, param: str | None) -> ApiError:
    """The refusal of a request's steering."""
    return ApiError(400, "invalid_steering", message, param=param)
