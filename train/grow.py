"""A model twice as wide that computes the same: the large one begins with what the small one has learned.

Function-preserving widening (Net2Net, Chen et al., 2016; bert2BERT, Chen et al., 2022): every channel, head and unit
is there twice, and what reads a pair reads half of each. Noise of opposite sign on the halves tells the twins apart
without changing the result, so that training can make them differ.
"""

from __future__ import annotations

import torch
from torch import Tensor

from thinkserve.train.model import Model, Shape

NOISE = 0.3  # relative to the standard deviation of the matrix


def widened(small: Model, shape: Shape) -> Model:
    """The small model in `shape`, whose widths are twice its own; the logits stay the same but for rounding.

    Raises ValueError if the shape is not twice as wide and as deep.
    """
    given = small.shape
    widths = [(s.hidden, s.feed_forward, s.heads, s.kv_heads) for s in (given, shape)]
    kept = [(s.layers, s.head_dim, s.vocabulary) for s in (given, shape)]
    if tuple(2 * width for width in widths[0]) != widths[1] or kept[0] != kept[1]:
        raise ValueError(f"{shape.name} is not {given.name} at twice the width")
    large = Model(shape)
    noise = torch.Generator().manual_seed(0)
    large.load_state_dict({name: _wide(name, w, shape.head_dim, noise) for name, w in small.state_dict().items()})
    return large


def _wide(name: str, weight: Tensor, head_dim: int, noise: torch.Generator) -> Tensor:
    """One parameter: outputs are doubled, inputs split."""
    part = name.split(".")[-2]
    match part:
        case "q_norm" | "k_norm":  # within a head
            wide = weight
        case "norm":  # the tied output reads every channel twice
            wide = torch.cat((weight, weight)) / 2
        case "input_layernorm" | "post_attention_layernorm":
            wide = torch.cat((weight, weight))
        case "embed_tokens":
            wide = torch.cat((weight, weight), 1)
        case "q_proj" | "k_proj" | "v_proj":  # twins stand side by side, so that groups of heads stay together
            heads = weight.view(-1, head_dim, weight.shape[1])
            wide = _split(heads.repeat_interleave(2, 0).flatten(0, 1), noise)
        case "o_proj":
            halves = [half.view(len(weight), -1, head_dim) for half in _split(weight, noise).chunk(2, 1)]
            wide = torch.cat([torch.stack(halves, 2).flatten(1)] * 2)
        case _:
            wide = _split(torch.cat((weight, weight)), noise)
    return wide


def _split(weight: Tensor, noise: torch.Generator) -> Tensor:
    """[outputs, inputs] for inputs that are there twice, [outputs, 2 * inputs]."""
    apart = torch.randn(weight.shape, generator=noise) * weight.std() * NOISE
    return torch.cat((weight / 2 + apart, weight / 2 - apart), 1)
