"""Which form of a kernel runs where: one rule for all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from thinkserve.kernels import cpu

Provider = Literal["native", "triton", "cpp"]


def provider(device: str, *, cpp: bool) -> Provider:
    """Who runs an op: Triton on a GPU; on the CPU C++ where it could be built (`cpp`)."""
    if device == "cuda":
        return "triton"
    return "cpp" if device == "cpu" and cpp else "native"


def form(
    name: str,
    device: str,
    native: Callable[..., Any],
    fused: Callable[..., Any],
    choose: Callable[..., Provider] = provider,
) -> Callable[..., Any]:
    """The form of the kernel `name` for a device; `choose` takes the device and whether there is a C++ form."""
    compiled = cpu.op(name) if device == "cpu" else None
    forms = {"native": native, "triton": fused, "cpp": compiled}
    return forms[choose(device, cpp=compiled is not None)] or native
