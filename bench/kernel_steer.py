"""Bench of kernels/steer.py: `PYTHONSAFEPATH=1 .venv/bin/python bench/kernel_steer.py [--quick]`.

eager is the same in PyTorch operations on the steered rows; compiled is torch.compile over all rows; rowwise is one
`add_` for each vector of each row, as a hook would do it. `of copy` counts the bytes of the steered rows, read and
written, and of their vectors.
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

SLOTS = 8
QUICK_SIZES = [(8, 256, torch.float32, 1), (64, 256, torch.float32, 16)]
# Steps of the embedded models, then of a model of 5120 in decoding, and (GPU) one whole prefill batch.
SIZES = [
    *[(rows, 256, torch.float32, steered) for rows, steered in ((1, 1), (8, 0), (8, 1), (8, 8), (64, 1), (64, 64))],
    *[(rows, 5120, torch.bfloat16, steered) for rows, steered in ((1, 1), (64, 1), (64, 64), (512, 512))],
]
GPU_SIZES = [(256, 5120, torch.bfloat16, 256), (4096, 5120, torch.bfloat16, 4096), (4096, 5120, torch.bfloat16, 16)]


def compiled_steer(hidden: Tensor, vectors: Tensor, index: Tensor, scale: Tensor) -> None:
    """The expression that Inductor fuses, written back."""
    hidden.copy_(steer.native(hidden, vectors, index, scale))


def rowwise(hidden: Tensor, vectors: Tensor, index: Tensor, scale: Tensor) -> None:
    """One addition for each vector of each row."""
    for row, (which, strength) in enumerate(zip(index[:, 0].tolist(), scale[:, 0].tolist(), strict=True)):
        if which >= 0:
            hidden[row].add_(vectors[which], alpha=strength)


def cases(sizes: list[tuple[int, int, torch.dtype, int]]) -> Iterator[Case]:
    """A case for every size: rows, hidden size, dtype, and how many rows are steered."""
    inductor = compiled(compiled_steer)
    for rows, size, dtype, steered in sizes:
        hidden = torch.randn(rows, size, device=device()).to(dtype)
        vectors = torch.randn(SLOTS, size, device=device()).to(dtype)
        index = torch.full((rows, 1), -1, device=device())
        index[torch.randperm(rows, device=device())[:steered]] = torch.arange(steered, device=device())[:, None] % SLOTS
        scale = torch.full((rows, 1), 1e-3, device=device())
        given = (hidden, vectors, index, scale)
        result = hidden.clone()
        steer.steer(result, *given[1:])
        forms = {"ours": steer.steer, "eager": steer.steer_native, "compiled": inductor}
        forms |= {"rowwise": rowwise} if rows <= 512 else {}
        yield Case(
            f"{rows} x {size} {str(dtype)[6:]}, {steered} steered",
            {name: partial(form, *given) for name, form in forms.items()},
            error=rms_ratio(result, steer.reference(*given)),
            allowed=1e-6 if dtype == torch.float32 else 4e-3,
            moved=(2 * steered + min(steered, SLOTS)) * size * dtype.itemsize,
        )


if __name__ == "__main__":
    chosen = options(__doc__ or "")
    torch.manual_seed(0)
    full = SIZES + (GPU_SIZES if device().type == "cuda" else [])
    bench("steer", cases(QUICK_SIZES if chosen.quick else full), QUICK if chosen.quick else FULL)
