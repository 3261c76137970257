"""What kernel tests share: one measure of error, poisoned outputs, Triton without a GPU (interpreter, compiler)."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction
from triton.runtime.interpreter import InterpretedFunction, _patch_lang

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CAPABILITIES = (80, 90, 100)
_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def rms_ratio(actual: Tensor, expected: Tensor) -> float:
    """Root mean square of the error over that of what was expected, both in float64; NaN in either is NaN."""
    wanted = expected.detach().to("cpu", torch.float64)
    error = (actual.detach().to("cpu", torch.float64) - wanted).square().mean().sqrt()
    scale = wanted.square().mean().sqrt()
    return (error / scale.clamp_min(torch.finfo(torch.float64).tiny)).item()


def tolerance(dtype: torch.dtype) -> float:
    """The RMS ratio that one rounding to `dtype` may leave, with room for float32 sums before it."""
    return {torch.float32: 2e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}[dtype]


def poisoned(*shape: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """A tensor full of NaN: what a kernel forgets to write shows."""
    return torch.full(shape, float("nan"), dtype=dtype, device=device)


def bits(tensor: Tensor) -> Tensor:
    """The same bytes as integers, so that NaN equals itself and -0.0 differs from 0.0."""
    return tensor.detach().cpu().contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize])


@contextmanager
def interpreted() -> Iterator[None]:
    """Within this block every Triton kernel runs in Triton's interpreter, on CPU tensors (float32: see the README).

    Unlike TRITON_INTERPRET=1 it needs no process of its own: what was decorated before is interpreted too, and the
    compiler and everybody else's kernels are as before afterwards.
    """

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        return InterpretedFunction(self.fn).run(*args, grid=grid, warmup=warmup, **kwargs)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        scope = _patch_lang(self.fn)
        try:
            return InterpretedFunction(self.fn).rewrite()(*args, **kwargs)
        finally:
            scope.restore()

    before = (JITFunction.run, JITFunction.__call__)
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = True
        JITFunction.run, JITFunction.__call__ = run, call
        try:
            yield
        finally:
            JITFunction.run, JITFunction.__call__ = before


@dataclass(frozen=True, slots=True)
class Compiled:
    """What the compiler made of a kernel: registers of a thread, and bytes it spills to local memory."""

    registers: int
    spills: int


def compile_ahead(
    kernel: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    capability: int,
    *,
    warps: int = 4,
    fusion: bool = False,
    aligned: Collection[str] = (),
) -> Compiled:
    """Compile `kernel` for a GPU that need not be there (capability 90: an H100 or H200).

    `signature` gives Triton's type ("*bf16", "i32", "fp32") of every argument that is no constant, `constants` the
    others; `warps` and `fusion` (multiply-add in one rounding) are what the kernel is launched with. Triton warns when
    a launch leaves `enable_fp_fusion` out. `aligned` names the arguments that are multiples of 16, as Triton finds them
    at a launch: addresses of tensors and usual sizes; without it every element is loaded by itself.
    """
    types = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    known = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(fn=kernel, signature=types, constexprs=dict(constants), attrs=known)
    options = {"num_warps": warps, "enable_fp_fusion": fusion}
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = subprocess.run([_CUOBJDUMP, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return Compiled(found["REG"], found["STACK"] + found["LOCAL"])


def runnable(forms: Iterable[str]) -> list[tuple[str, torch.dtype]]:
    """Every form of a kernel in every dtype, as far as it runs here: interpreted, Triton takes float32 alone."""
    everywhere = torch.cuda.is_available()
    return [
        (form, dtype) for form in forms for dtype in DTYPES if everywhere or form != "triton" or dtype.itemsize == 4
    ]
