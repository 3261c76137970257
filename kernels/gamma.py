"""ln P(a, x), the regularised lower incomplete gamma function, for PyTorch and as a function of Triton kernels.

P is one integral on either side of x = a; with D = x^a exp(-x) / Gamma(a),

    P(a, x)     = D * integral over s >= 0 of exp(-(a - x) s - x (exp(-s) - 1 + s))       x < a, by t = x exp(-s)
    1 - P(a, x) = D * integral over s >= 0 of exp(-(x - a) s - x (exp(s) - 1 - s))        x >= a, by t = x exp(s)

Both integrands only fall, so one Gauss rule over the span in which they fall from 1 to exp(-16) serves every a >= 1:
no loop whose length depends on the data, no cancellation in either tail. D is taken in float64, the rest in float32.
The absolute error of the logarithm stays below 1e-5, and with it the relative error of P, however small P is.
"""

from __future__ import annotations

import math
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

# Gauss-Legendre, 14 points on [0, 1]: the lower half of the nodes (the upper are 1 - node), and their weights.
_NODES: Final = (
    0.006858095651593787, 0.03578255816821324, 0.08639934246511749, 0.15635354759415726, 0.24237568182092295,
    0.3404438155360551, 0.44597252564632817,
)  # fmt: skip
_WEIGHTS: Final = (
    0.017559730165875875, 0.04007904357987999, 0.060759285343951655, 0.07860158357909681, 0.09276919873896894,
    0.10259923186064786, 0.10763192673157897,
)  # fmt: skip
NODES: Final = tl.constexpr(_NODES + tuple(1 - node for node in _NODES))
WEIGHTS: Final = tl.constexpr(_WEIGHTS * 2)
POINTS: Final = tl.constexpr(14)
# What is left out beyond the span is exp(-16) of the integrand's peak.
DEPTH: Final = tl.constexpr(16.0)
HALF_LOG_TAU: Final = tl.constexpr(0.5 * math.log(2 * math.pi))


def log_gamma_cdf(alpha: Tensor, x: Tensor) -> Tensor:
    """ln P(alpha, x) for alpha >= 1 and x >= 0, broadcast against each other; float64."""
    shape, argument = alpha.double(), x.double()
    gap = shape - argument
    integral = _integral(gap.abs().float(), argument.float(), torch.where(gap > 0, 1.0, -1.0).float())
    whole = _log_density(shape, argument) + integral.double().log()
    # Below x = a the integral is P itself, above it is the rest.
    return torch.where(gap > 0, whole, torch.log1p(-whole.exp()))


def gamma_cdf(alpha: Tensor, x: Tensor) -> Tensor:
    """P(alpha, x), the distribution function at x of a Gamma variable of shape alpha >= 1 and rate 1; float64."""
    return log_gamma_cdf(alpha, x).exp()


def _log_density(shape: Tensor, x: Tensor) -> Tensor:
    density: Tensor = shape * x.log() - x - shape.lgamma()
    return density


def _integral(gap: Tensor, x: Tensor, sign: Tensor) -> Tensor:
    """The integral over s of exp(-gap s - x psi(sign s)), psi(s) = exp(-s) - 1 + s."""
    span = 2 * DEPTH.value / (gap + (gap * gap + 2 * DEPTH.value * x).sqrt())
    bend = torch.expm1(-sign * span)
    # One step of Newton's method from the span of the parabola: it never stops short of the depth.
    span = span - (gap * span + x * (bend + sign * span) - DEPTH.value) / (gap - x * sign * bend)
    total: Tensor = torch.zeros_like(span)
    for node, weight in zip(NODES.value, WEIGHTS.value, strict=True):
        s: Tensor = span * node
        total = total + weight * torch.exp(-gap * s - x * (torch.expm1(-sign * s) + sign * s))
    return total.mul(span)


@triton.jit
def _psi(s: tl.tensor) -> tl.tensor:
    """exp(-s) - 1 + s, by its series where the difference would cancel."""
    series = 1 / 2 - s * (1 / 6 - s * (1 / 24 - s * (1 / 120 - s * (1 / 720 - s * (1 / 5040 - s * (1 / 40320))))))
    return tl.where(tl.abs(s) < 0.5, s * s * series, tl.exp(-s) - 1 + s)


@triton.jit
def log_cdf(shape: tl.tensor, x: tl.tensor) -> tl.tensor:
    """ln P(shape, x) of float64 tensors; float64."""
    shifted = shape + 3
    inverse = 1 / (shifted * shifted)
    stirling = (1 / 12 - inverse * (1 / 360 - inverse * (1 / 1260))) / shifted
    product = shape * (shape + 1) * (shape + 2)
    log_gamma = (shifted - 0.5) * tl.log(shifted) - shifted + HALF_LOG_TAU + stirling - tl.log(product)
    log_density = shape * tl.log(x) - x - log_gamma
    below = shape > x
    gap = tl.abs(shape - x).to(tl.float32)
    near = x.to(tl.float32)
    sign = tl.where(below, 1.0, -1.0)
    span = 2 * DEPTH / (gap + tl.sqrt(gap * gap + 2 * DEPTH * near))
    slope = gap + near * sign * (1 - tl.exp(-sign * span))
    span -= (gap * span + near * _psi(sign * span) - DEPTH) / slope
    total = tl.zeros_like(near)
    for i in tl.static_range(POINTS):
        s = span * NODES[i]
        total += WEIGHTS[i] * tl.exp(-gap * s - near * _psi(sign * s))
    whole = log_density + tl.log(total * span)
    rest = tl.exp(tl.minimum(whole.to(tl.float32), -0.1))
    return tl.where(below, whole, tl.log(1 - rest).to(tl.float64))
