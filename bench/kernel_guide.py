"""Bench of kernels/guide.py: `PYTHONSAFEPATH=1 .venv/bin/python bench/kernel_guide.py [--quick]`.

eager is the same in PyTorch operations, compiled those under torch.compile, published the definition in float64 with
PyTorch's own incomplete gamma function, its probabilities normalised one after another.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from bench.kernel_common import FULL, QUICK, Case, bench, compiled, device, options, rms_ratio
from thinkserve.kernels.guide import guide, native, reference

SMALL, LARGE = 640, 152064


def sizes(*, quick: bool) -> list[tuple[int, int]]:
    """Rows at a line start in one step, and vocabulary: the embedded model's, and one of today's large models."""
    if device().type == "cuda":
        return [(rows, LARGE) for rows in ((32,) if quick else (1, 8, 32, 256))]
    return [(1, SMALL), (8, SMALL)] if quick else [(1, SMALL), (4, SMALL), (16, SMALL), (1, LARGE)]


def inputs(rows: int, vocab: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits, shapes, rates and budgets; the masks drop about four in ten of the predictions."""
    sizes, on = (rows, vocab), device()
    mode, lam = torch.rand(sizes, device=on) * 8, torch.rand(sizes, device=on) * 20 + 5
    return torch.randn(sizes, device=on) * 4, mode * lam + 1, lam, torch.rand(rows, device=on) * 2000 + 1


def cases(*, quick: bool) -> Iterator[Case]:
    """Ours against the same in eager PyTorch, under torch.compile, and as published (PyTorch's own gamma function)."""
    for rows, vocab in sizes(quick=quick):
        arguments = inputs(rows, vocab)
        forms: dict[str, Callable[..., object]] = {"ours": guide, "eager": native}
        forms |= {"compiled": compiled(native), "published": reference}
        ways = {name: (lambda form=form, a=arguments: form(*a)) for name, form in forms.items()}
        error = rms_ratio(guide(*arguments).double().exp(), reference(*arguments).exp())
        # Four numbers of four bytes an entry: logit, shape, rate, result.
        yield Case(f"{rows} x {vocab}", ways, error, 1e-6, rows * vocab * 16)


if __name__ == "__main__":
    chosen = options(__doc__)
    with torch.inference_mode():
        bench("guide", cases(quick=chosen.quick), QUICK if chosen.quick else FULL)
