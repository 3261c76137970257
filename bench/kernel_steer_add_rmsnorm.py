"""Bench of kernels/steer_add_rmsnorm.py: `PYTHONSAFEPATH=1 .venv/bin/python bench/kernel_steer_add_rmsnorm.py`.

norm is our kernel without any steering (an index of no columns), eager_norm PyTorch's residual addition and RMSNorm one
operation after the other, which is what vLLM runs on a CPU; unfused is `steer` and then eager_norm; eager and compiled
are the whole in PyTorch operations, the latter under torch.compile and not in place (Inductor's C++ of torch 2.13 fails
on the copies back). `of copy` counts x and residual, read and written,
and the vectors.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from bench.kernel_common import FULL, QUICK, Case, bench, compiled, device, options, rms_ratio
from thinkserve.kernels import steer
from thinkserve.kernels import steer_add_rmsnorm as fused

SLOTS, EPS = 8, 1e-6
QUICK_SIZES = [(8, 256, torch.float32, 1), (64, 256, torch.float32, 64)]
# Steps of the embedded models, then of a model of 5120 in decoding, and (GPU) one whole prefill batch.
SIZES = [
    *[(rows, 256, torch.float32, steered) for rows, steered in ((1, 1), (8, 0), (8, 1), (8, 8), (64, 1), (64, 64))],
    *[(rows, 5120, torch.bfloat16, steered) for rows, steered in ((1, 1), (64, 1), (64, 64), (512, 512))],
]
GPU_SIZES = [(256, 5120, torch.bfloat16, 256), (4096, 5120, torch.bfloat16, 4096), (4096, 5120, torch.bfloat16, 16)]


def eager_norm(x: Tensor, residual: Tensor, weight: Tensor) -> None:
    """Residual addition and RMSNorm, one operation after the other, in place."""
    total = x.float() + residual.float()
    factor = torch.rsqrt(total.pow(2).mean(dim=-1, keepdim=True) + EPS)
    residual.copy_(total)
    x.copy_((total * factor).to(weight.dtype) * weight)


def unfused(x: Tensor, residual: Tensor, weight: Tensor, vectors: Tensor, index: Tensor, scale: Tensor) -> None:
    """The pair that is fused."""
    steer.steer(x, vectors, index, scale)
    eager_norm(x, residual, weight)


def cases(sizes: list[tuple[int, int, torch.dtype, int]]) -> Iterator[Case]:
    """A case for every size: rows, hidden size, dtype, and how many rows are steered."""
    inductor = compiled(fused.native)
    for rows, size, dtype, steered in sizes:
        x, residual = (torch.randn(rows, size, device=device()).to(dtype) for _ in range(2))
        weight, vectors = (torch.randn(*shape, device=device()).to(dtype) for shape in ((size,), (SLOTS, size)))
        index = torch.full((rows, 1), -1, device=device())
        index[torch.randperm(rows, device=device())[:steered]] = torch.arange(steered, device=device())[:, None] % SLOTS
        scale = torch.full((rows, 1), 1e-3, device=device())
        result = (x.clone(), residual.clone())
        fused.steer_add_rmsnorm(*result, weight, EPS, vectors, index, scale)
        true = fused.reference(x, residual, weight, EPS, vectors, index, scale)
        given = (x, residual, weight, EPS, vectors, index, scale)
        nothing = (index[:, :0].contiguous(), scale[:, :0].contiguous())
        ways = {
            "ours": partial(fused.steer_add_rmsnorm, *given),
            "eager": partial(fused.steer_add_rmsnorm_native, *given),
            "compiled": partial(inductor, *given),
            "unfused": partial(unfused, x, residual, weight, vectors, index, scale),
            "norm": partial(fused.steer_add_rmsnorm, x, residual, weight, EPS, vectors, *nothing),
            "eager_norm": partial(eager_norm, x, residual, weight),
        }
        yield Case(
            f"{rows} x {size} {str(dtype)[6:]}, {steered} steered",
            ways,
            error=max(rms_ratio(result[0], true[0]), rms_ratio(result[1], true[1])),
            allowed=1e-6 if dtype == torch.float32 else 4e-3,
            moved=(4 * rows + min(steered, SLOTS) + 1) * size * dtype.itemsize,
        )


if __name__ == "__main__":
    chosen = options(__doc__ or "")
    torch.manual_seed(0)
    full = SIZES + (GPU_SIZES if device().type == "cuda" else [])
    bench("steer_add_rmsnorm", cases(QUICK_SIZES if chosen.quick else full), QUICK if chosen.quick else FULL)
