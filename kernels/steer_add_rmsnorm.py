"""steer_add_rmsnorm: steering fused into the residual addition and RMSNorm that follow a decoder layer, in place.

    sum      = (x + sum_j scale_j * vectors[index_j]) + residual        float32
    residual = sum, rounded
    x        = sum / sqrt(mean(sum^2) + eps), rounded, times weight

A steered layer then moves no bytes beyond the vectors. On the CPU, rows without an index >= 0 equal vLLM's native
`fused_add_rms_norm` bit for bit, and in float32 steered rows equal `steer` followed by it. On a GPU this holds of the
residual; the mean is summed in the kernel's own order, so there the normed row equals that of the same kernel on a
batch that nobody steers. RMSNorm: arXiv:1910.07467.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from thinkserve.kernels import providers, steer

# The longest row that stays in the registers of one program.
LONGEST = 16384


def reference(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, vectors: Tensor, index: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """The new x and residual in float64, without rounding: the truth that tests compare with."""
    total = steer.reference(x, vectors, index, scale) + residual.double()
    return total / (total.square().mean(dim=-1, keepdim=True) + eps).sqrt() * weight.double(), total


def native(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, vectors: Tensor, index: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """The new x and residual in PyTorch operations only: no data-dependent shapes, for Inductor to fuse."""
    return _norm(steer.native(x.float(), vectors, index, scale), x.dtype, residual, weight, eps)


def _norm(total: Tensor, dtype: torch.dtype, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = total + residual.float()
    factor = torch.rsqrt(total.pow(2).mean(dim=-1, keepdim=True) + eps)
    return ((total * factor).to(weight.dtype) * weight).to(dtype), total.to(dtype)


@triton.jit
def steer_add_rmsnorm_kernel(
    x: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    eps: tl.tensor,
    vectors: tl.tensor,
    index: tl.tensor,
    scale: tl.tensor,
    size: tl.tensor,
    stride_x: tl.tensor,
    stride_residual: tl.tensor,
    slots: tl.tensor,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One row of `size` columns, kept in registers between its sum and its norm: every byte moves once."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    at = x + row * stride_x + columns
    at_residual = residual + row * stride_residual + columns
    total = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    before = tl.load(at_residual, mask=inside, other=0.0).to(tl.float32)
    for j in tl.static_range(K):
        which = tl.load(index + row * K + j)
        if (which >= 0) & (which < slots):
            vector = tl.load(vectors + which * size + columns, mask=inside, other=0.0).to(tl.float32)
            total += tl.load(scale + row * K + j) * vector
    total += before
    tl.store(at_residual, total.to(residual.dtype.element_ty), mask=inside)
    factor = tl.rsqrt(tl.sum(total * total, axis=0) / size + eps)
    normed = (total * factor).to(weight.dtype.element_ty).to(tl.float32)
    weights = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(at, (normed * weights).to(x.dtype.element_ty), mask=inside)


def shape_of(size: int) -> tuple[int, int]:
    """The block that holds a row of `size`, and its warps: 16 elements to a thread leave room for a second row."""
    block = triton.next_power_of_2(size)
    return block, min(32, max(1, block // 512))


def steer_add_rmsnorm_triton(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, vectors: Tensor, index: Tensor, scale: Tensor
) -> None:
    """`steer_add_rmsnorm` by the Triton kernel. An index past the table reads nothing and adds nothing."""
    check(x, residual, weight, vectors, index, scale)
    rows, size = x.shape
    if not rows:
        return
    block, warps = shape_of(size)
    sizes = (size, x.stride(0), residual.stride(0), vectors.shape[0])
    # Rounded after every product and sum, as PyTorch does one by one.
    options: dict[str, Any] = {"num_warps": warps, "enable_fp_fusion": False}
    steer_add_rmsnorm_kernel[(rows,)](
        x, residual, weight, eps, vectors, index, scale, *sizes, K=index.shape[1], BLOCK=block, **options
    )


def steer_add_rmsnorm_native(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, vectors: Tensor, index: Tensor, scale: Tensor
) -> None:
    """`steer_add_rmsnorm` by eager PyTorch operations; steering touches the steered rows only."""
    check(x, residual, weight, vectors, index, scale)
    total = x.to(torch.float32, copy=True)
    steer.steer_native(total, vectors.to(torch.float32), index, scale)
    new, total = _norm(total, x.dtype, residual, weight, eps)
    x.copy_(new)
    residual.copy_(total)


def check(x: Tensor, residual: Tensor, weight: Tensor, vectors: Tensor, index: Tensor, scale: Tensor) -> None:
    """Raise ValueError or TypeError for what the kernels cannot take (the C++ form checks the same itself)."""
    steer.check(x, vectors, index, scale)
    if residual.shape != x.shape or residual.stride(1) != 1:
        raise ValueError(f"residual must be {[*x.shape]}, each row in one piece: {[*residual.shape]}")
    if weight.shape != x.shape[1:] or not weight.is_contiguous():
        raise ValueError(f"weight must be [{x.shape[1]}], contiguous: {[*weight.shape]}")
    if {residual.dtype, weight.dtype} != {x.dtype}:
        raise TypeError(f"residual and weight must be {x.dtype}: {residual.dtype}, {weight.dtype}")


def provider(device: str, size: int, *, cpp: bool) -> providers.Provider:
    """Who runs the op for rows of `size`: as ever, but PyTorch where a row does not fit a GPU's registers."""
    return "native" if device == "cuda" and size > LONGEST else providers.provider(device, cpp=cpp)


@functools.cache
def _form(device: str, size: int) -> Callable[..., None]:
    choose = functools.partial(provider, size=size)
    return providers.form("steer_add_rmsnorm", device, steer_add_rmsnorm_native, steer_add_rmsnorm_triton, choose)


def _run(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, vectors: Tensor, index: Tensor, scale: Tensor
) -> None:
    _form(x.device.type, x.shape[1])(x, residual, weight, eps, vectors, index, scale)


_opaque = torch.library.custom_op("thinkserve::steer_add_rmsnorm", _run, mutates_args=("x", "residual"))


@_opaque.register_fake
def _fake(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, vectors: Tensor, index: Tensor, scale: Tensor
) -> None:
    check(x, residual, weight, vectors, index, scale)


def steer_add_rmsnorm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, vectors: Tensor, index: Tensor, scale: Tensor
) -> None:
    """Steer `x`, add it to `residual`, and replace `x` by the normed sum; both in place.

    Args:
        x: [rows, H], float32, bfloat16 or float16, each row in one piece; written.
        residual: [rows, H], of the same dtype; written.
        weight: [H], of the same dtype.
        eps: added to the mean square.
        vectors: [slots, H], contiguous, of the same dtype or float32.
        index: [rows, k], int64: which vectors, -1 for none.
        scale: [rows, k], float32.

    Raises:
        ValueError, TypeError: shapes, layouts or dtypes are others.
        IndexError: an index is past the table (CPU; on a GPU such an entry is passed over).
    """
    # Outside a compiled graph the op's own dispatch would cost more than a small batch does.
    (_opaque if torch.compiler.is_compiling() else _run)(x, residual, weight, eps, vectors, index, scale)
