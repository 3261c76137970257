"""What all tests share: async tests run on asyncio, as the server does; properties have no clock on a busy machine.

Tests on a real engine come last, because whatever else is wrong is found in a fraction of the time.
"""

from __future__ import annotations

import pytest
from hypothesis import settings

settings.register_profile("thinkserve", deadline=None, max_examples=40)
settings.load_profile("thinkserve")


@pytest.fixture
def anyio_backend() -> str:
    """The event loop of `@pytest.mark.anyio` tests."""
    return "asyncio"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what uses the real engine (`-m "not vllm"` leaves it out) and move it to the end."""
    for item in items:
        if {"backend", "portal"} & set(getattr(item, "fixturenames", ())):
            item.add_marker("vllm")
    items.sort(key=lambda item: item.get_closest_marker("vllm") is not None)
