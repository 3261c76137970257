"""One real vLLM for the whole test session, on an event loop of its own in a thread.

A test takes `backend` and `portal`, writes its scenario as an async function and runs it with `portal.call(scenario)`.
A live HTTP server over the same engine runs on the same loop: `portal.start_task_soon(uvicorn_server.serve)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from anyio.from_thread import BlockingPortal, start_blocking_portal
from prometheus_client import REGISTRY

from thinkserve.server.settings import Settings
from thinkserve.server.vllm_engine import VllmBackend, create


@pytest.fixture(scope="session")
def portal() -> Iterator[BlockingPortal]:
    """The way into the engine's event loop."""
    with start_blocking_portal("asyncio") as portal:
        yield portal


@pytest.fixture(scope="session")
def backend(portal: BlockingPortal) -> Iterator[VllmBackend]:
    """The embedded model on vLLM, started once; 65 thousand tokens of cache and more are plenty for tests."""
    backend = portal.call(create, Settings(kv_cache_gib=0.25))
    yield backend
    portal.call(backend.aclose)


@pytest.fixture(scope="session")
def counted() -> Callable[[], int]:
    """vLLM's own count of generated tokens: its Prometheus counter, over all requests so far."""

    def read() -> int:
        families = [family for family in REGISTRY.collect() if family.name == "vllm:generation_tokens"]
        return int(sum(s.value for family in families for s in family.samples if s.name.endswith("_total")))

    return read
