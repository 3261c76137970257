"""Bench of kernels/token_stats.py: `PYTHONSAFEPATH=1 .venv/bin/python bench/kernel_token_stats.py [--quick]`.

eager is the same in few PyTorch operations, compiled those under torch.compile, unfused one call for each number.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from bench.kernel_common import FULL, QUICK, Case, bench, compiled, device, options, rms_ratio
from thinkserve.kernels.token_stats import native, reference, token_stats

CLOSE = 7
SMALL, LARGE = 640, 152064


def sizes(*, quick: bool) -> list[tuple[int, int, torch.dtype]]:
    """Rows, vocabulary, type: the embedded model's decode steps, and a vocabulary of today's large models."""
    if device().type == "cuda":
        rows = [256] if quick else [1, 8, 64, 256]
        return [(count, LARGE, dtype) for dtype in (torch.bfloat16, torch.float32) for count in rows]
    small = [(rows, SMALL, torch.float32) for rows in ((1, 64) if quick else (1, 8, 64))]
    return small if quick else [*small, (64, SMALL, torch.bfloat16), (4, LARGE, torch.float32)]


def unfused(logits: Tensor, vocab: int, close: int) -> tuple[Tensor, ...]:
    """One PyTorch call after another, each statistic by itself."""
    z = logits[:, :vocab].float()
    total, mean = z.logsumexp(1), z.mean(1)
    entropy = torch.special.entr(z.softmax(1)).sum(1)
    first, second = z.topk(2).values.unbind(1)
    others = torch.cat([z[:, :close], z[:, close + 1 :]], 1)
    return total, mean, total - mean, entropy, first - second, z[:, close] - others.amax(1)


def cases(*, quick: bool) -> Iterator[Case]:
    """Ours against the same in eager PyTorch, under torch.compile, and call by call."""
    for rows, vocab, dtype in sizes(quick=quick):
        logits = (torch.randn(rows, vocab, device=device()) * 4 + 3).to(dtype)
        arguments = (logits, vocab, CLOSE)
        forms: dict[str, Callable[..., object]] = {"ours": token_stats, "eager": native}
        forms |= {"compiled": compiled(native), "unfused": unfused}
        ways = {name: (lambda form=form, a=arguments: form(*a)) for name, form in forms.items()}
        error = rms_ratio(token_stats(*arguments), reference(*arguments))
        moved = rows * (vocab * dtype.itemsize + 24)
        yield Case(f"{rows} x {vocab} {str(dtype).removeprefix('torch.')}", ways, error, 2e-6, moved)


if __name__ == "__main__":
    chosen = options(__doc__)
    with torch.inference_mode():
        bench("token_stats", cases(quick=chosen.quick), QUICK if chosen.quick else FULL)
