"""Widening: the same function in a larger model, whose twins can become different."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from thinkserve.train.grow import widened
from thinkserve.train.model import SHAPES, Model, Shape, rotations

SMALL = Shape("tiny", hidden=32, layers=2, feed_forward=48, heads=4, kv_heads=2, head_dim=16)
LARGE = replace(SMALL, name="wide", hidden=64, feed_forward=96, heads=8, kv_heads=4)


def small() -> Model:
    torch.manual_seed(3)
    model = Model(SMALL)
    for weight in model.parameters():  # norms too, so that none of them is all ones
        torch.nn.init.normal_(weight, mean=0.1 if weight.dim() == 1 else 0.0, std=0.2)
    return model


def test_a_widened_model_computes_the_same() -> None:
    """The logits are those of the small model but for rounding, at every position."""
    ids = torch.randint(0, SMALL.vocabulary, (2, 60))
    angles = rotations(60, SMALL.head_dim)
    before = small()
    with torch.no_grad():
        torch.testing.assert_close(widened(before, LARGE)(ids, *angles), before(ids, *angles), atol=1e-3, rtol=1e-4)


def test_twins_learn_different_things() -> None:
    """After a step of training the two halves of a layer are no longer copies of each other."""
    model = widened(small(), LARGE)
    ids = torch.randint(0, SMALL.vocabulary, (2, 60))
    torch.autograd.backward(model.loss(ids, ids, *rotations(60, SMALL.head_dim)))
    gradient = model.blocks()[0].mlp.gate_proj.weight.grad
    assert gradient is not None
    first, second = gradient.chunk(2)
    assert not torch.allclose(first, second, rtol=0.1)


def test_the_family_s_shapes_fit() -> None:
    """The large member is the small one at twice the width."""
    widened(Model(SHAPES["small"]), SHAPES["large"])


def test_another_shape_is_refused() -> None:
    """Deeper or three times as wide cannot be widened to."""
    for shape in (replace(LARGE, layers=3), replace(LARGE, hidden=96)):
        with pytest.raises(ValueError, match="wide is not tiny at twice the width"):
            widened(small(), shape)
