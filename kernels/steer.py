"""steer: add steering vectors to the rows of a hidden state that want them, in place.

    for each row, for j = 0 .. k-1 where index[row, j] >= 0:  hidden[row] += scale[row, j] * vectors[index[row, j]]

The sum is made in float32 and rounded once. A row with no index >= 0 is not written at all: it keeps its bits, whatever
its neighbours do. This is activation addition (arXiv:2308.10248) with a vector, and a strength, per token.

`steer` is what to call. Under torch.compile it is one opaque op (`thinkserve::steer`); where Inductor shall fuse the
sum into what follows, write `hidden = native(...)` instead.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from thinkserve.kernels.providers import form

BLOCK = 1024
WARPS = 4


def reference(hidden: Tensor, vectors: Tensor, index: Tensor, scale: Tensor) -> Tensor:
    """What `steer` makes of `hidden`, in float64 and without rounding: the truth that tests compare with."""
    result = hidden.double()
    for j in range(index.shape[1]):
        rows = (index[:, j] >= 0).nonzero().squeeze(1)
        result[rows] += scale[rows, j, None].double() * vectors[index[rows, j]].double()
    return result


def native(hidden: Tensor, vectors: Tensor, index: Tensor, scale: Tensor) -> Tensor:
    """The steered rows as a new tensor, in PyTorch operations only: no data-dependent shapes, for Inductor to fuse."""
    total = hidden.float()
    for j in range(index.shape[1]):
        which = index[:, j]
        more = total + scale[:, j, None] * vectors[which.clamp_min(0)].float()
        total = torch.where((which >= 0)[:, None], more, total)
    return torch.where((index >= 0).any(dim=1, keepdim=True), total.to(hidden.dtype), hidden)


@triton.jit
def steer_kernel(
    hidden: tl.tensor,
    vectors: tl.tensor,
    index: tl.tensor,
    scale: tl.tensor,
    size: tl.tensor,
    stride: tl.tensor,
    slots: tl.tensor,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One block of columns of one row; `size` columns, rows `stride` apart. A row that is not steered costs K loads."""
    row = tl.program_id(0).to(tl.int64)
    steered = False
    for j in tl.static_range(K):
        steered |= tl.load(index + row * K + j) >= 0
    if steered:
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = columns < size
        at = hidden + row * stride + columns
        total = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        for j in tl.static_range(K):
            which = tl.load(index + row * K + j)
            if (which >= 0) & (which < slots):
                vector = tl.load(vectors + which * size + columns, mask=inside, other=0.0).to(tl.float32)
                total += tl.load(scale + row * K + j) * vector
        tl.store(at, total.to(hidden.dtype.element_ty), mask=inside)


def steer_triton(hidden: Tensor, vectors: Tensor, index: Tensor, scale: Tensor) -> None:
    """`steer` by the Triton kernel. An index past the table reads nothing and leaves the row's sum as it is."""
    check(hidden, vectors, index, scale)
    rows, size = hidden.shape
    if not (rows and index.shape[1]):
        return
    grid = (rows, triton.cdiv(size, BLOCK))
    sizes = (size, hidden.stride(0), vectors.shape[0])
    # Rounded after the product and after the sum, as PyTorch does one by one.
    options: dict[str, Any] = {"num_warps": WARPS, "enable_fp_fusion": False}
    steer_kernel[grid](hidden, vectors, index, scale, *sizes, K=index.shape[1], BLOCK=BLOCK, **options)


def steer_native(hidden: Tensor, vectors: Tensor, index: Tensor, scale: Tensor) -> None:
    """`steer` by eager PyTorch operations, on the steered rows only."""
    check(hidden, vectors, index, scale)
    rows = (index >= 0).any(dim=1).nonzero().squeeze(1)
    if rows.numel():
        hidden[rows] = native(hidden[rows], vectors, index[rows], scale[rows])


def check(hidden: Tensor, vectors: Tensor, index: Tensor, scale: Tensor) -> None:
    """Raise ValueError or TypeError for what the kernels cannot take (the C++ form checks the same itself)."""
    if index.shape != scale.shape or index.dim() != 2 or index.shape[0] != hidden.shape[0]:
        raise ValueError(f"index and scale must be [{hidden.shape[0]}, k]: {[*index.shape]}, {[*scale.shape]}")
    if vectors.dim() != 2 or vectors.shape[1] != hidden.shape[1]:
        raise ValueError(f"vectors must be [slots, {hidden.shape[1]}]: {[*vectors.shape]}")
    if index.dtype != torch.int64 or scale.dtype != torch.float32:
        raise TypeError(f"index must be int64 and scale float32: {index.dtype}, {scale.dtype}")
    if vectors.dtype not in {hidden.dtype, torch.float32}:
        raise TypeError(f"vectors must be {hidden.dtype} or torch.float32: {vectors.dtype}")
    if hidden.stride(1) != 1 or not (vectors.is_contiguous() and index.is_contiguous() and scale.is_contiguous()):
        raise ValueError("rows of hidden must lie in one piece; vectors, index and scale must be contiguous")


@functools.cache
def _form(device: str) -> Callable[..., None]:
    return form("steer", device, steer_native, steer_triton)


def _run(hidden: Tensor, vectors: Tensor, index: Tensor, scale: Tensor) -> None:
    _form(hidden.device.type)(hidden, vectors, index, scale)


_opaque = torch.library.custom_op("thinkserve::steer", _run, mutates_args=("hidden",))


@_opaque.register_fake
def _fake(hidden: Tensor, vectors: Tensor, index: Tensor, scale: Tensor) -> None:
    check(hidden, vectors, index, scale)


def steer(hidden: Tensor, vectors: Tensor, index: Tensor, scale: Tensor) -> None:
    """Add to every row of `hidden` its vectors times their strengths, in place.

    Args:
        hidden: [rows, H], float32, bfloat16 or float16, each row in one piece; written.
        vectors: [slots, H], contiguous, of the same dtype or float32.
        index: [rows, k], int64: which vectors, -1 for none; repeated ones count as often as they occur.
        scale: [rows, k], float32.

    Raises:
        ValueError, TypeError: shapes, layouts or dtypes are others.
        IndexError: an index is past the table (CPU; on a GPU such an entry is passed over).
    """
    # Outside a compiled graph the op's own dispatch would cost more than a small batch does.
    (_opaque if torch.compiler.is_compiling() else _run)(hidden, vectors, index, scale)
