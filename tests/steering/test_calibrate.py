"""The strength: a closed form, derivatives that are right, and a choice that never costs accuracy."""

from __future__ import annotations

import math
from contextlib import ExitStack

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.steering.scripted_writer import Call, ScriptedWriter
from thinkserve.steering.calibrate import Point, bound, choose, cut_anywhere, derivatives, gamma_star, measure
from thinkserve.steering.extract import TEMPERATURE
from thinkserve.steering.model import Model
from thinkserve.steering.questions import BRIEF, Question
from thinkserve.steering.writer import Written

QUESTIONS = [Question("Compute 2+2.", "4"), Question("Compute 9-1.", "8")]


def point(scale: float, tokens: float, accuracy: float) -> Point:
    return Point(scale, tokens, tokens, accuracy, 1.0)


@given(st.floats(1e-3, 1e3), st.floats(0, 1e4), st.floats(1e-6, 1e-1))
def test_gamma_star_meets_the_bound_exactly(slope: float, curvature: float, epsilon: float) -> None:
    """A quarter of the square of the bound on the logits' change is epsilon."""
    gamma = gamma_star(slope, curvature, epsilon)

    assert epsilon == pytest.approx((slope * gamma + curvature * gamma**2 / 2) ** 2 / 4, rel=1e-9)


def test_gamma_star_in_its_limits() -> None:
    """No curvature, no slope, neither; and the textbook form where that is accurate."""
    assert 2 * math.sqrt(1e-3) / 5 == pytest.approx(gamma_star(5.0, 0.0))
    assert (16e-3) ** 0.25 / math.sqrt(3) == pytest.approx(gamma_star(0.0, 3.0))
    assert math.inf == gamma_star(0.0, 0.0)
    assert (math.sqrt(4 + 4 * 3 * math.sqrt(1e-3)) - 2) / 3 == pytest.approx(gamma_star(2.0, 3.0))


def test_derivatives_are_those_of_the_logits(model: Model) -> None:
    """Against central differences, as far as the single precision inside the norms lets them be taken."""
    ids = model.prompt(QUESTIONS[0].text)
    vectors = {0: torch.linspace(-1, 1, 16), 1: torch.linspace(1, 0, 16)}
    step = 0.05

    def logits(gamma: float) -> torch.Tensor:
        def add(layer: int, hidden: torch.Tensor) -> torch.Tensor:
            changed = hidden.clone()
            changed[:, -1] += gamma * vectors[layer].double()
            return changed

        with ExitStack() as stack, torch.no_grad():
            for layer in vectors:
                stack.enter_context(model.hooked(layer, add))
            out: torch.Tensor = model.model(torch.tensor([ids]), use_cache=False).logits[0, -1]
        return out

    slope, curvature = derivatives(model, ids, vectors)
    model.model.double()
    try:
        low, middle, high = (logits(gamma) for gamma in (-step, 0.0, step))
    finally:
        model.model.float()

    assert float(((high - low) / (2 * step)).norm()) == pytest.approx(slope, rel=1e-2)
    assert float(((high - 2 * middle + low) / step**2).norm()) == pytest.approx(curvature, rel=5e-2)


def test_one_step_stays_below_the_bound(model: Model) -> None:
    """The mean divergence at gamma* over the states that it was measured on is at most epsilon."""
    vectors = {1: torch.linspace(-1, 1, 16)}
    written = [Written(model.encode("So 4 and then 8."), [], False)] * 2
    states = cut_anywhere(model, QUESTIONS, written, 12, seed=0)
    found = bound(model, vectors, states, epsilon=1e-3)

    def chances(ids: list[int], gamma: float) -> torch.Tensor:
        def add(_: int, hidden: torch.Tensor) -> torch.Tensor:
            changed = hidden.clone()
            changed[:, -1] += gamma * vectors[1]
            return changed

        with model.hooked(1, add), torch.no_grad():
            out: torch.Tensor = model.model(torch.tensor([ids]), use_cache=False).logits[0, -1]
        return out.double().log_softmax(-1)

    pairs = [(chances(ids, 0.0), chances(ids, found.gamma)) for ids in states]
    divergence = sum(float((p.exp() * (p - q)).sum()) for p, q in pairs) / len(pairs)
    assert 0 < divergence <= 1e-3
    assert len(states) == found.states == 12


@pytest.mark.parametrize(
    ("points", "tolerance", "scale"),
    [
        ([(0, 100, 0.9), (0.5, 60, 0.9), (1, 40, 0.9)], 0.0, 1),
        ([(0, 100, 0.9), (0.5, 60, 0.9), (1, 40, 0.7)], 0.0, 0.5),
        ([(0, 100, 0.9), (0.5, 60, 0.8), (1, 40, 0.95)], 0.0, 0),
        ([(0, 100, 0.9), (0.5, 60, 0.88), (1, 40, 0.87)], 0.025, 0.5),
        ([(0, 100, 0.9), (0.5, 120, 0.9)], 0.0, 0),
        ([(1, 40, 0.9), (0.5, 60, 0.9), (0, 100, 0.9)], 0.0, 1),
        ([(-1, 10, 0.9), (0, 100, 0.9)], 0.0, 0),
    ],
)
def test_the_choice_is_the_largest_strength_before_the_first_loss(
    points: list[tuple[float, float, float]], tolerance: float, scale: float
) -> None:
    """In order of scale; a strength that does not shorten is not worth having."""
    assert scale == choose([point(*each) for each in points], tolerance).scale


def test_a_point_counts_tokens_and_right_answers(model: Model) -> None:
    """Of every question once, with the vector at work; or of the question that asks for brevity."""
    right = model.encode(r"So it is \boxed{4}.")
    writer = ScriptedWriter(lambda prompt, _: Written(right, right[:3], prompt == model.prompt(QUESTIONS[0].text)))
    vectors = {1: torch.ones(16)}

    found, written = measure(model, writer, QUESTIONS, vectors, 0.5, seed=3, most=8)
    asked, _ = measure(model, writer, QUESTIONS, {}, 0.0, seed=3, most=8, brief=True)

    assert Point(0.5, len(right), 3, 0.5, 0.5) == found
    assert [right] * 2 == [each.tokens for each in written]
    assert Point(0.0, len(right), 3, 0.5, 0.0) == asked
    prompts = [model.prompt(q.text) for q in QUESTIONS]
    assert Call(prompts, vectors, 0.5, TEMPERATURE, 3, 8) == writer.calls[0]
    assert [model.prompt(f"{q.text} {BRIEF}") for q in QUESTIONS] == writer.calls[1].prompts
