"""The metrics of several engines in one process, on one page.

vLLM takes all `vllm:*` metrics off Prometheus' registry whenever an engine starts, so that of several engines only the
last would be seen. Here each engine's metrics leave the registry for a collector of ours as soon as they exist: vLLM
does not know it and takes nothing from it. The label `model_name` tells the engines apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from threading import Lock
from typing import Any

from prometheus_client import REGISTRY, Metric
from prometheus_client.registry import Collector
from vllm.v1.metrics.loggers import PrometheusStatLogger

# Engines that start at the same time must not find each other's metrics on the registry.
_STARTING = Lock()


class Kept(Collector):
    """Metrics of any number of engines; those of one name are one family."""

    def __init__(self) -> None:
        self._engines: dict[EngineMetrics, list[Collector]] = {}

    def describe(self) -> Iterable[Metric]:
        """No names: the next engine registers the same ones."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """All samples of all engines, each with the name of its model."""
        families: dict[str, Metric] = {}
        for engine, collectors in list(self._engines.items()):
            label = {"model_name": engine.vllm_config.model_config.served_model_name}
            for family in (family for collector in collectors for family in collector.collect()):
                named = [sample._replace(labels=label | sample.labels) for sample in family.samples]
                known = families.setdefault(family.name, family)
                known.samples = named if known is family else known.samples + named
        yield from families.values()

    def take(self, engine: EngineMetrics) -> None:
        """Move what the engine has just registered from the registry to here."""
        names = REGISTRY._names_to_collectors.items()
        collectors = {id(each): each for name, each in names if name.startswith("vllm:")}
        for collector in collectors.values():
            REGISTRY.unregister(collector)
        self._engines.setdefault(engine, []).extend(collectors.values())

    def drop(self, engine: EngineMetrics) -> None:
        """Forget an engine that has been stopped."""
        self._engines.pop(engine, None)


KEPT = Kept()
REGISTRY.register(KEPT)


class EngineMetrics(PrometheusStatLogger):
    """vLLM's metrics of one engine."""

    def __init__(self, *args: Any, **more: Any) -> None:
        with _STARTING:
            super().__init__(*args, **more)
            KEPT.take(self)

    def log_engine_initialized(self) -> None:
        """vLLM registers one more metric here: how its cache is configured."""
        with _STARTING:
            super().log_engine_initialized()
            KEPT.take(self)
