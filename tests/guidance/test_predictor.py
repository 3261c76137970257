"""The predictor is the paper's: states of one position, order of layers unknown to it, a Gamma for every next token."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from thinkserve.guidance.predictor import MOST_ALPHA, Predictor, Size, gamma_nll, positive

SIZE = Size(hidden=8, states=3, vocabulary=11, width=64, layers=2, heads=2)


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    """Random weights."""
    torch.manual_seed(0)
    return Predictor(SIZE).eval().requires_grad_(False)


def test_there_is_a_shape_and_a_rate_for_every_token_and_both_are_positive(predictor: Predictor) -> None:
    """[rows, vocabulary] float32, whatever the type of the states."""
    alpha, rate = predictor(torch.randn(5, 3, 8, dtype=torch.bfloat16))

    assert ((5, 11), (5, 11)) == (alpha.shape, rate.shape)
    assert torch.float32 == alpha.dtype == rate.dtype
    assert (alpha > 0).all()
    assert (rate > 0).all()


def test_the_order_of_the_layers_is_not_seen(predictor: Predictor) -> None:
    """No positions: permuted states give the same parameters."""
    states = torch.randn(4, 3, 8)

    torch.testing.assert_close(predictor(states[:, [2, 0, 1]]), predictor(states))


def test_a_row_does_not_depend_on_its_neighbours(predictor: Predictor) -> None:
    """One call for all rows of a step equals one call per row."""
    states = torch.randn(6, 3, 8)
    alone = torch.cat([predictor(row[None])[0] for row in states])

    torch.testing.assert_close(alone, predictor(states)[0])


def test_the_parameters_of_chosen_tokens_are_those_of_the_whole_vocabulary(predictor: Predictor) -> None:
    """Training looks at one row of the heads, serving at all."""
    states, tokens = torch.randn(6, 3, 8), torch.tensor([0, 10, 3, 3, 7, 1])
    alpha, rate = predictor(states)
    rows = torch.arange(6)

    torch.testing.assert_close(
        (alpha[rows, tokens], rate[rows, tokens]), predictor.chosen(predictor.encode(states), tokens)
    )


def test_the_cls_vector_begins_at_zero() -> None:
    """As published."""
    assert 0 == Predictor(SIZE).cls.abs().max()


def test_the_loss_is_the_gamma_density() -> None:
    """Against torch's own distribution."""
    alpha, rate, x = torch.rand(50) * 30 + 0.5, torch.rand(50) * 20 + 0.5, torch.rand(50) * 6 + 0.1

    gamma: Any = torch.distributions.Gamma(alpha, rate)

    torch.testing.assert_close(-gamma.log_prob(x), gamma_nll(alpha, rate, x))


def test_a_shape_beyond_the_kernels_range_is_held_there_with_its_mean() -> None:
    """Only the width of the distribution changes."""
    alpha, rate = positive(torch.tensor([1000.0, 50.0]), torch.tensor([250.0, 10.0]))

    torch.testing.assert_close(alpha, torch.tensor([MOST_ALPHA, 50.0]))
    torch.testing.assert_close(alpha / rate, torch.tensor([4.0, 5.0]), rtol=1e-4, atol=0.0)


@pytest.mark.parametrize(("hidden", "width", "layers"), [(96, 64, 2), (256, 128, 2), (2048, 768, 12), (8192, 768, 12)])
def test_the_encoder_is_sized_to_the_model(hidden: int, width: int, layers: int) -> None:
    """The paper's for large ones."""
    size = Size.of(hidden, blocks=4, vocabulary=100)

    assert (width, layers, 5) == (size.width, size.layers, size.states)
    assert 0 == size.width % size.heads


def test_one_target_is_learned(predictor: Predictor) -> None:
    """Some steps on a constant length: the predicted median comes to lie at it."""
    torch.manual_seed(1)
    learner = Predictor(replace(SIZE, layers=1))
    optimizer = torch.optim.Adam(learner.parameters(), lr=1e-2)
    states, token, x = torch.randn(16, 3, 8), torch.full((16,), 4), torch.full((16,), math.log(20 + 1))
    for _ in range(150):
        loss = gamma_nll(*learner.chosen(learner.encode(states), token), x).mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    alpha, rate = learner.chosen(learner.encode(states), token)

    assert float((alpha / rate).detach().mean()) == pytest.approx(math.log(21), rel=0.1)
