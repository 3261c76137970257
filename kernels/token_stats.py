"""token_stats: what a row of logits says about its next token, as six numbers, in one pass over the row.

Columns of the result, from raw logits z over V entries (before temperature, penalties and masks; padding not counted):

    0  logsumexp  ln sum exp z
    1  mean       mean z
    2  certainty  logsumexp - mean - ln V: the KL divergence of the uniform distribution from softmax(z), whose mean
                  over a chain is its self-certainty (arXiv:2502.18581, section 3)
    3  entropy    of softmax(z), in nats; an entry of -inf adds nothing
    4  margin     largest minus second largest logit
    5  close      z[close] minus the largest other logit: the log-odds of ending the thinking here against the best way
                  to go on (arXiv:2510.00546); -inf where no such token is given

Every row needs a finite entry. With one of -inf the mean is -inf and the certainty +inf.
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

from thinkserve.kernels.providers import form

COLUMNS: Final = ("logsumexp", "mean", "certainty", "entropy", "margin", "close")
# Stands for -inf wherever it would be multiplied by zero; its exponential is zero beside any logit.
LOWEST: Final = tl.constexpr(-1e30)
LANES: Final = 2048
# Enough programs to keep the memory of a large GPU busy; rows are cut into parts until there are so many.
PROGRAMS: Final = 1024


def reference(logits: Tensor, vocab: int, close: int = -1) -> Tensor:
    """The definition, in float64."""
    z = logits[:, :vocab].double()
    total, mean = z.logsumexp(1), z.mean(1)
    entropy = torch.special.entr(z.softmax(1)).sum(1)
    first, second = z.topk(2).values.unbind(1)
    odds = torch.full_like(total, -math.inf)
    if close >= 0:
        others = z.clone()
        others[:, close] = -math.inf
        odds = z[:, close] - others.amax(1)
    return torch.stack([total, mean, total - mean - math.log(vocab), entropy, first - second, odds], 1)


def native(logits: Tensor, vocab: int, close: int = -1) -> Tensor:
    """The same in float32 and few operations, open to the compiler."""
    z = logits[:, :vocab].float()
    top = z.topk(2).values
    first, second = top[:, :1], top[:, 1:]
    shifted = z - first
    weights = shifted.exp()
    mass = weights.sum(1, keepdim=True)
    slope = (weights * shifted.clamp_min(LOWEST.value)).sum(1, keepdim=True)
    mean, size = z.mean(1, keepdim=True), mass.log()
    odds = torch.full_like(first, -math.inf)
    if close >= 0:
        own = z[:, close : close + 1]
        odds = own - torch.where(own >= first, second, first)
    certainty = size + (first - mean) - math.log(vocab)
    return torch.cat([first + size, mean, certainty, size - slope / mass, first - second, odds], 1)


@triton.jit
def _merge(first: tl.tensor, second: tl.tensor, mass: tl.tensor, slope: tl.tensor, total: tl.tensor) -> Any:
    """One set of sums for several: relative to the largest entry of all."""
    lane = tl.arange(0, first.shape[0])
    peak = tl.max(first, 0)
    runner_up = tl.maximum(tl.max(second, 0), tl.max(tl.where(lane == tl.argmax(first, 0), float("-inf"), first), 0))
    step = tl.maximum(first, LOWEST) - tl.maximum(peak, LOWEST)
    weight = tl.exp(step)
    return peak, runner_up, tl.sum(mass * weight, 0), tl.sum((slope + mass * step) * weight, 0), tl.sum(total, 0)


@triton.jit
def _write(
    out: tl.tensor,
    logits: tl.tensor,
    vocab: tl.tensor,
    close: tl.tensor,
    first: tl.tensor,
    second: tl.tensor,
    mass: tl.tensor,
    slope: tl.tensor,
    total: tl.tensor,
) -> None:
    size, mean = tl.log(mass), total / vocab
    own = tl.load(logits + close, mask=close >= 0, other=float("-inf")).to(tl.float32)
    tl.store(out, first + size)
    tl.store(out + 1, mean)
    tl.store(out + 2, size + (first - mean) - tl.log(vocab.to(tl.float32)))
    tl.store(out + 3, size - slope / mass)
    tl.store(out + 4, first - second)
    tl.store(out + 5, own - tl.where(own >= first, second, first))


@triton.jit(do_not_specialize=["vocab", "close", "span"])
def part_kernel(
    logits: tl.tensor,
    stride: tl.tensor,
    vocab: tl.tensor,
    close: tl.tensor,
    span: tl.tensor,
    out: tl.tensor,
    lanes: tl.constexpr,
    whole: tl.constexpr,
) -> None:
    """Program (row, part): sums over `span` columns from part * span; the statistics if they are the `whole` row.

    Each lane keeps its own sums relative to its own largest entry, so one exponential an entry is enough: it rescales
    either what was there or what is new. Lanes meet only at the end.
    """
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    begin = part * span
    end = tl.minimum(begin + span, vocab)
    logits += row * stride
    lane = tl.arange(0, lanes)
    first = tl.full([lanes], float("-inf"), tl.float32)
    second = first
    mass = tl.zeros([lanes], tl.float32)
    slope, total = mass, mass
    for at in tl.range(begin, end, lanes):
        inside = at + lane < end
        z = tl.load(logits + at + lane, mask=inside, other=float("-inf")).to(tl.float32)
        step = tl.maximum(z, LOWEST) - tl.maximum(first, LOWEST)
        scale = tl.exp(-tl.abs(step))
        slope = tl.where(step > 0, (slope - mass * step) * scale, slope + scale * step)
        mass = tl.where(step > 0, mass * scale + 1, mass + scale)
        total += tl.where(inside, z, 0.0)
        second = tl.maximum(second, tl.minimum(first, z))
        first = tl.maximum(first, z)
    first, second, mass, slope, total = _merge(first, second, mass, slope, total)
    if whole:
        _write(out + row * 6, logits, vocab, close, first, second, mass, slope, total)
    else:
        out += (row * tl.num_programs(1) + part) * 5
        tl.store(out, first)
        tl.store(out + 1, second)
        tl.store(out + 2, mass)
        tl.store(out + 3, slope)
        tl.store(out + 4, total)


@triton.jit(do_not_specialize=["vocab", "close", "parts"])
def merge_kernel(
    logits: tl.tensor,
    stride: tl.tensor,
    vocab: tl.tensor,
    close: tl.tensor,
    sums: tl.tensor,
    parts: tl.tensor,
    out: tl.tensor,
    lanes: tl.constexpr,
) -> None:
    """Program row: the statistics from the sums of its parts, [rows, parts, 5]."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, lanes)
    sums += (row * parts + lane) * 5
    inside = lane < parts
    first = tl.load(sums, mask=inside, other=float("-inf"))
    second = tl.load(sums + 1, mask=inside, other=float("-inf"))
    mass = tl.load(sums + 2, mask=inside, other=0.0)
    slope = tl.load(sums + 3, mask=inside, other=0.0)
    total = tl.load(sums + 4, mask=inside, other=0.0)
    first, second, mass, slope, total = _merge(first, second, mass, slope, total)
    _write(out + row * 6, logits + row * stride, vocab, close, first, second, mass, slope, total)


def fused(logits: Tensor, vocab: int, close: int = -1) -> Tensor:
    """The same by Triton: one reading of the logits, and a second small kernel where rows were cut into parts."""
    rows = logits.shape[0]
    out = torch.empty(rows, 6, dtype=torch.float32, device=logits.device)
    if not rows:
        return out
    lanes = min(LANES, triton.next_power_of_2(vocab))
    blocks = triton.cdiv(vocab, lanes)
    span = triton.cdiv(blocks, min(triton.cdiv(PROGRAMS, rows), blocks)) * lanes
    parts = triton.cdiv(vocab, span)
    sums = out if parts == 1 else torch.empty(rows, parts, 5, dtype=torch.float32, device=logits.device)
    stride = logits.stride(0)
    part_kernel[rows, parts](logits, stride, vocab, close, span, sums, lanes=lanes, whole=parts == 1, num_warps=8)
    if parts > 1:
        # As for one row, which has the most parts: with widths of their own, other batches would compile in serving.
        wide = triton.next_power_of_2(min(blocks, PROGRAMS))
        merge_kernel[rows,](logits, stride, vocab, close, sums, parts, out, lanes=wide, num_warps=1)
    return out


@functools.cache
def _form(device: str) -> Callable[..., Tensor]:
    return form("token_stats", device, native, fused)


def _run(logits: Tensor, vocab: int, close: int) -> Tensor:
    return _form(logits.device.type)(logits, vocab, close)


_opaque = torch.library.custom_op("thinkserve::token_stats", _run, mutates_args=())


@_opaque.register_fake
def _fake(logits: Tensor, vocab: int, close: int) -> Tensor:
    return logits.new_empty(logits.shape[0], len(COLUMNS), dtype=torch.float32)


def token_stats(logits: Tensor, vocab: int, close: int = -1) -> Tensor:
    """Statistics of every row: [rows, 6] float32, in the order of COLUMNS.

    Args:
        logits: [rows, width], raw, float32, bfloat16 or float16; width may exceed `vocab` by padding.
        vocab: entries of a row that count, at least 2.
        close: the token that ends thinking, -1 for none.

    Raises:
        ValueError: `vocab` or `close` do not fit.
    """
    if logits.ndim != 2 or not 2 <= vocab <= logits.shape[1]:
        raise ValueError(f"a vocabulary of {vocab} does not fit logits of shape {[*logits.shape]}")
    if not -1 <= close < vocab:
        raise ValueError(f"the closing token {close} is not in a vocabulary of {vocab}")
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    # Outside a compiled graph the op's own dispatch would cost more than a small batch does.
    result: Tensor = (_opaque if torch.compiler.is_compiling() else _run)(logits, vocab, close)
    return result
