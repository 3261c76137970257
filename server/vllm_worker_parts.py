"""Which parts a worker has: one line per capability."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from thinkserve.server.vllm_worker import Part


def build(worker: Any, model: Any, wanted: Mapping[str, Any]) -> tuple[Part, ...]:
    """The parts that the configuration names, in the order in which they see logits (read first, change last)."""
    from thinkserve.server import vllm_worker_guidance, vllm_worker_stats, vllm_worker_steering

    makers: dict[str, Any] = {
        "stats": vllm_worker_stats.make,
        "steering": vllm_worker_steering.make,
        "guidance": vllm_worker_guidance.make,
    }
    return tuple(make(worker, model, wanted[name]) for name, make in makers.items() if name in wanted)
