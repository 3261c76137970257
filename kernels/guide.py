"""guide: the next-token distribution given that the thinking ends within its budget (arXiv:2506.13752).

For every token v a predictor gives the shape alpha_v and the rate lam_v of a Gamma distribution of log(L + 1), L being
the tokens of thinking left after v. With B tokens of the budget remaining (section 3 of the paper and its code):

    r_v = GammaCDF(log(B + 1); alpha_v, lam_v)                           how likely v still ends in time
    r_v = 0 unless lam_v >= lam_min, alpha_v > alpha_min and exp((alpha_v - 1) / lam_v) - 1 >= mode_min
    p   = normalise(softmax(raw logits) * r)                             one-hot at the largest raw logit if all are 0

All of it is kept as logarithms. Where the published form underflows to r = 0 everywhere (a budget far below every
prediction) this one still tells the tokens apart: only the masks, and raw logits of -inf, give exact zeros.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from thinkserve.kernels.gamma import log_cdf, log_gamma_cdf
from thinkserve.kernels.providers import form

# Stands for -inf wherever it would be subtracted from itself.
LOWEST: Final = tl.constexpr(-1e30)
BLOCK: Final = 512
WARPS: Final = 8


def reference(
    logits: Tensor,
    alpha: Tensor,
    lam: Tensor,
    remaining: Tensor,
    lam_min: float = 10.0,
    alpha_min: float = 1.0,
    mode_min: float = 0.9,
) -> Tensor:
    """The definition as published, in float64 and by PyTorch's own incomplete gamma function: r is not a logarithm."""
    shape, rate = alpha.double(), lam.double()
    horizon = (remaining.double().clamp_min(1.0) + 1).log()[:, None]
    r = torch.special.gammainc(shape, rate * horizon)
    r[~((lam >= lam_min) & (alpha > alpha_min) & (torch.expm1((shape - 1) / rate) >= mode_min))] = 0
    p = logits.double().softmax(1) * r
    hopeless = p.sum(1) == 0
    p[hopeless] = torch.nn.functional.one_hot(logits[hopeless].argmax(1), logits.shape[1]).double()
    result: Tensor = (p / p.sum(1, keepdim=True)).log()
    return result


def native(
    logits: Tensor,
    alpha: Tensor,
    lam: Tensor,
    remaining: Tensor,
    lam_min: float = 10.0,
    alpha_min: float = 1.0,
    mode_min: float = 0.9,
) -> Tensor:
    """`guide` in PyTorch operations only."""
    horizon = (remaining.double().clamp_min(1.0) + 1).log()[:, None]
    kept = (lam >= lam_min) & (alpha > alpha_min) & (alpha - 1 >= math.log1p(mode_min) * lam) & (alpha < math.inf)
    log_r = log_gamma_cdf(alpha, lam.double() * horizon)
    scores = torch.where(kept, logits.double() + log_r, -math.inf)
    best = torch.zeros_like(scores).scatter_(1, logits.argmax(1, keepdim=True), 1.0).log()
    hopeless = scores.amax(1, keepdim=True) == -math.inf
    return torch.where(hopeless, best, scores - scores.logsumexp(1, keepdim=True)).float()


@triton.jit(do_not_specialize=["vocab"])
def score_kernel(
    logits: tl.tensor, stride: tl.tensor, alpha: tl.tensor, lam: tl.tensor, remaining: tl.tensor, vocab: tl.tensor,
    lam_min: tl.tensor, alpha_min: tl.tensor, log_mode_min: tl.tensor, out: tl.tensor, sums: tl.tensor, best: tl.tensor,
    block: tl.constexpr,
) -> None:  # fmt: skip
    """Program (row, part): logit + ln r of a block of entries into `out`.

    Of the block go into `sums`, [rows, parts, 3]: the largest score, the sum of exp(score - largest), the largest raw
    logit; into `best`, [rows, parts], the column of the last.
    """
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = part * block + tl.arange(0, block)
    inside = column < vocab
    z = tl.load(logits + row * stride + column, mask=inside, other=float("-inf")).to(tl.float32)
    shape = tl.load(alpha + row * vocab + column, mask=inside, other=1.0)
    rate = tl.load(lam + row * vocab + column, mask=inside, other=1.0)
    kept = (rate >= lam_min) & (shape > alpha_min) & (shape - 1 >= log_mode_min * rate) & (shape < float("inf"))
    # What is dropped must not meet the arithmetic: it may be infinite or no number.
    shape, rate = tl.where(kept, shape, 1.0), tl.where(kept, rate, 1.0)
    horizon = tl.log(tl.maximum(tl.load(remaining + row), 1.0).to(tl.float64) + 1)
    log_r = log_cdf(shape.to(tl.float64), rate.to(tl.float64) * horizon)
    score = tl.where(kept, (z.to(tl.float64) + log_r).to(tl.float32), float("-inf"))
    tl.store(out + row * vocab + column, score, mask=inside)
    place = row * tl.num_programs(1) + part
    peak = tl.max(score, 0)
    tl.store(sums + place * 3, peak)
    tl.store(sums + place * 3 + 1, tl.sum(tl.exp(score - tl.maximum(peak, LOWEST)), 0))
    tl.store(sums + place * 3 + 2, tl.max(z, 0))
    tl.store(best + place, part * block + tl.argmax(z, 0))


@triton.jit(do_not_specialize=["vocab", "parts"])
def normalise_kernel(
    out: tl.tensor, sums: tl.tensor, best: tl.tensor, vocab: tl.tensor, parts: tl.tensor,
    wide: tl.constexpr, block: tl.constexpr,
) -> None:  # fmt: skip
    """Program (row, part): the scores of a block less the logarithm of the row's sum; one-hot if there is no score."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, wide)
    within = lane < parts
    place = row * parts + lane
    peaks = tl.load(sums + place * 3, mask=within, other=float("-inf"))
    masses = tl.load(sums + place * 3 + 1, mask=within, other=0.0)
    raw = tl.load(sums + place * 3 + 2, mask=within, other=float("-inf"))
    peak = tl.max(peaks, 0)
    mass = tl.sum(masses * tl.exp(tl.maximum(peaks, LOWEST) - tl.maximum(peak, LOWEST)), 0)
    top = tl.load(best + row * parts + tl.argmax(raw, 0))
    column = tl.program_id(1) * block + tl.arange(0, block)
    inside = column < vocab
    score = tl.load(out + row * vocab + column, mask=inside, other=float("-inf"))
    alone = tl.where(column == top, 0.0, float("-inf"))
    # Peak first: a peak of hundreds would round the logarithm of the sum away.
    scaled = (score - tl.maximum(peak, LOWEST)) - tl.log(tl.where(mass > 0, mass, 1.0))
    result = tl.where(peak == float("-inf"), alone, scaled)
    tl.store(out + row * vocab + column, result, mask=inside)


def fused(
    logits: Tensor,
    alpha: Tensor,
    lam: Tensor,
    remaining: Tensor,
    lam_min: float = 10.0,
    alpha_min: float = 1.0,
    mode_min: float = 0.9,
    *,
    block: int = BLOCK,
) -> Tensor:
    """`guide` by two Triton kernels: every input is read once, the result written, read and written again."""
    rows, vocab = logits.shape
    out = torch.empty(rows, vocab, dtype=torch.float32, device=logits.device)
    if not rows:
        return out
    parts = triton.cdiv(vocab, block)
    sums = torch.empty(rows, parts, 3, dtype=torch.float32, device=logits.device)
    best = torch.empty(rows, parts, dtype=torch.int32, device=logits.device)
    masks = (lam_min, alpha_min, math.log1p(mode_min))
    score_kernel[rows, parts](
        logits, logits.stride(0), alpha, lam, remaining, vocab, *masks, out, sums, best, block=block, num_warps=WARPS
    )
    wide = triton.next_power_of_2(parts)
    normalise_kernel[rows, triton.cdiv(vocab, 4 * block)](out, sums, best, vocab, parts, wide=wide, block=4 * block)
    return out


@functools.cache
def _form(device: str) -> Callable[..., Tensor]:
    return form("guide", device, native, fused)


def _run(
    logits: Tensor,
    alpha: Tensor,
    lam: Tensor,
    remaining: Tensor,
    lam_min: float,
    alpha_min: float,
    mode_min: float,
) -> Tensor:
    return _form(logits.device.type)(logits, alpha, lam, remaining, lam_min, alpha_min, mode_min)


_opaque = torch.library.custom_op("thinkserve::guide", _run, mutates_args=())


@_opaque.register_fake
def _fake(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape, dtype=torch.float32)


def guide(
    logits: Tensor,
    alpha: Tensor,
    lam: Tensor,
    remaining: Tensor,
    lam_min: float = 10.0,
    alpha_min: float = 1.0,
    mode_min: float = 0.9,
) -> Tensor:
    """Log-probabilities of the guided next token: [rows, V] float32, -inf where the probability is 0.

    Args:
        logits: [rows, V], raw (before temperature, penalties and masks), of any float type; at -inf they stay -inf.
        alpha: [rows, V], shapes of the Gamma distributions of ln(tokens left + 1).
        lam: [rows, V], their rates.
        remaining: [rows], tokens of the budget that are left; below 1 counts as 1.
        lam_min: a prediction with a smaller rate is too diffuse and counts for nothing.
        alpha_min: so does one with no larger a shape, and
        mode_min: one whose most likely length is fewer tokens.

    Raises:
        ValueError: the shapes do not belong together.
    """
    if logits.ndim != 2 or not alpha.shape == lam.shape == logits.shape or remaining.shape != logits.shape[:1]:
        shapes = [[*tensor.shape] for tensor in (logits, alpha, lam, remaining)]
        raise ValueError(f"logits, alpha and lam must be [rows, V] and remaining [rows]: {shapes}")
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    parameters = (alpha.float().contiguous(), lam.float().contiguous(), remaining.float().contiguous())
    # Outside a compiled graph the op's own dispatch would cost more than a small batch does.
    run = _opaque if torch.compiler.is_compiling() else _run
    result: Tensor = run(logits, *parameters, lam_min, alpha_min, mode_min)
    return result
