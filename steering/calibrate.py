"""How strong: the scale of a vector that shortens most at no loss, and what a bound on the change of one step allows.

The bound (arXiv:2507.04742, section 4 and appendix A.1): with z(g) the logits after adding g*v to the state of layer l,
KL(p(0), p(g)) <= 1/4 |z(g) - z(0)|^2 and |z(g) - z(0)| <= a g + L g^2 / 2, where a = |z'(0)| and L bounds |z''|. The
bound is the square of a polynomial, so it meets epsilon exactly at

    gamma* = (sqrt(a^2 + 4 L sqrt(epsilon)) - a) / L            (L -> 0: 2 sqrt(epsilon) / a)

without the cubic and the safety factor of the paper. a is measured as the median over states, L as the 95th percentile.
The bound is for one step and says nothing of a whole thought: it is a unit to compare vectors by; the sweep decides.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from thinkserve.steering.extract import TEMPERATURE
from thinkserve.steering.model import Model
from thinkserve.steering.questions import Question
from thinkserve.steering.writer import Vectors, Writer, Written

EPSILON = 1e-3


@dataclass(frozen=True, slots=True)
class Bound:
    """`slope` a and `curvature` L of the logits along a vector, over `states` states, and gamma* for `epsilon`."""

    slope: float
    curvature: float
    states: int
    epsilon: float

    @property
    def gamma(self) -> float:
        """The scale at which the bound on the change of one step is met."""
        return gamma_star(self.slope, self.curvature, self.epsilon)


@dataclass(frozen=True, slots=True)
class Point:
    """One scale of the sweep: mean tokens of a completion and of its thinking, and the share of right answers."""

    scale: float
    tokens: float
    thinking: float
    accuracy: float
    closed: float


def gamma_star(slope: float, curvature: float, epsilon: float = EPSILON) -> float:
    """The positive root g of a g + L g^2 / 2 = 2 sqrt(epsilon); infinite when nothing changes the logits."""
    # The textbook form multiplied by its conjugate: no cancellation, and L = 0 needs no case of its own.
    below = math.sqrt(slope * slope + 4 * curvature * math.sqrt(epsilon)) + slope
    return 4 * math.sqrt(epsilon) / below if below > 0 else math.inf


def derivatives(model: Model, tokens: Sequence[int], vectors: Vectors) -> tuple[float, float]:
    """|z'(0)| and |z''(0)| for the vectors added to the last token's state; forward mode, exact to rounding."""
    ids = torch.tensor([list(tokens)], device=model.device)
    zero, one = torch.zeros((), device=model.device), torch.ones((), device=model.device)
    moved = {layer: vector.to(model.device) for layer, vector in vectors.items()}

    def logits(gamma: Tensor) -> Tensor:
        def add(layer: int, hidden: Tensor) -> Tensor:
            return torch.cat([hidden[:, :-1], hidden[:, -1:] + gamma * moved[layer]], 1)

        with ExitStack() as stack:
            for layer in moved:
                stack.enter_context(model.hooked(layer, add))
            out: Tensor = model.model(ids, use_cache=False, logits_to_keep=1).logits
        return out[0, -1]

    def slope(gamma: Tensor) -> Tensor:
        tangent: Tensor = torch.func.jvp(logits, (gamma,), (one,))[1]
        return tangent

    found = torch.func.jvp(slope, (zero,), (one,))
    return float(found[0].norm()), float(found[1].norm())


def bound(model: Model, vectors: Vectors, sequences: Sequence[Sequence[int]], epsilon: float = EPSILON) -> Bound:
    """The bound from the last states of the sequences: median slope, 95th percentile of the curvature."""
    measured = [derivatives(model, tokens, vectors) for tokens in sequences]
    slopes, curvatures = [a for a, _ in measured], sorted(c for _, c in measured)
    return Bound(statistics.median(slopes), _percentile(curvatures, 0.95), len(measured), epsilon)


def cut_anywhere(
    model: Model, questions: Sequence[Question], written: Sequence[Written], n: int, seed: int
) -> list[list[int]]:
    """`n` sequences that end where a step of generation begins: a prompt and some of what was written after it."""
    rng = random.Random(seed)
    found: list[list[int]] = []
    for index in range(n):
        at = index % len(questions)
        tokens = written[at].tokens
        found.append(model.prompt(questions[at].text) + tokens[: rng.randrange(len(tokens))])
    return found


def measure(
    model: Model,
    writer: Writer,
    questions: Sequence[Question],
    vectors: Vectors,
    scale: float,
    *,
    seed: int,
    most: int,
    brief: bool = False,
) -> tuple[Point, list[Written]]:
    """One point of the sweep, sampled as the extraction samples; `brief` asks for brevity instead of or beside it."""
    prompts = [model.prompt(question.brief if brief else question.text) for question in questions]
    written = writer.write(prompts, vectors, scale, temperature=TEMPERATURE, seed=seed, most=most)
    n = len(questions)
    right = sum(q.check(model.decode(w.tokens)) for q, w in zip(questions, written, strict=True))
    tokens, thinking = (
        sum(map(len, each)) / n for each in ([w.tokens for w in written], [w.thinking for w in written])
    )
    return Point(scale, tokens, thinking, right / n, sum(w.closed for w in written) / n), written


def choose(points: Sequence[Point], tolerance: float) -> Point:
    """The scale with the fewest tokens while accuracy stays within `tolerance` of that at scale 0; 0 when none does.

    Accuracy is flat and then breaks, so nothing beyond the first loss counts. Only lengths that shrink are worth it.
    """
    ordered = sorted(points, key=lambda point: point.scale)
    best = plain = next(point for point in ordered if point.scale == 0)
    for point in ordered:
        if point.scale > 0:
            if point.accuracy < plain.accuracy - tolerance:
                break
            best = point if point.tokens < best.tokens else best
    return best


def _percentile(ordered: Sequence[float], share: float) -> float:
    """Linear between the two nearest ranks."""
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)
