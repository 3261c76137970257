"""Every kernel test runs on the GPU that is found, or on the CPU with Triton interpreted; fresh memory is poisoned."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch

from tests.kernels.support import interpreted
from thinkserve.kernels import cpu


@pytest.fixture(scope="session", autouse=True)
def _built() -> None:
    """The C++ forms are compiled side by side, and once: later runs find them in the cache."""
    cpu.prepare()


@pytest.fixture
def device() -> torch.device:
    """Where the tensors of a test live."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def triton_runs() -> Callable[[], AbstractContextManager[None]]:
    """A block within which Triton kernels can be launched: interpreted without a GPU, else as they are."""
    return nullcontext if torch.cuda.is_available() else interpreted


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """`torch.empty` gives NaN (integers: the largest), so an output that was not written cannot look right."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(mode=True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(mode=False)
