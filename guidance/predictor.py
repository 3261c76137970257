"""The predictor of budget guidance: how long thinking goes on after each possible next token (arXiv:2506.13752).

    x = log(tokens left + 1) ~ Gamma(shape alpha_v, rate lambda_v)      for every next token v

A position is seen as the states [embedding, block 1, ..., block N after the final norm] of that position alone, as
Hugging Face reports them, behind a learned CLS vector. A small transformer encoder, without positions or mask, mixes
them; two bias-free heads over the vocabulary read its CLS output.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

# The Gamma function's kernel is accurate up to this shape; beyond it a distribution keeps its mean, no narrower.
MOST_ALPHA = 200.0


@dataclass(frozen=True, slots=True)
class Size:
    """Sizes of a predictor; the first three are the base model's (`states` = blocks + 1)."""

    hidden: int
    states: int
    vocabulary: int
    width: int
    layers: int
    heads: int

    @classmethod
    def of(cls, hidden: int, blocks: int, vocabulary: int) -> Size:
        """What suits a base model: the paper's BERT-base encoder from hidden size 2048 on, less for smaller ones."""
        width = min(768, max(64, hidden // 2 // 64 * 64))
        return cls(hidden, blocks + 1, vocabulary, width, layers=12 if width == 768 else 2, heads=width // 32)


class Predictor(nn.Module):
    """`forward` gives the Gamma parameters for all next tokens, `nll` the loss for the tokens that did come."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = size
        self.cls = nn.Parameter(torch.zeros(size.hidden))
        self.project = nn.Linear(size.hidden, size.width)
        layer = nn.TransformerEncoderLayer(
            size.width, size.heads, 4 * size.width, dropout=0.0, activation="gelu", batch_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, size.layers, enable_nested_tensor=False)
        self.alpha = nn.Linear(size.width, size.vocabulary, bias=False)
        self.rate = nn.Linear(size.width, size.vocabulary, bias=False)

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Shape and rate, both [rows, vocabulary] float32, from the states [rows, states, hidden] of each position."""
        seen = self.encode(states)
        return positive(self.alpha(seen).float(), self.rate(seen).float())

    def encode(self, states: Tensor) -> Tensor:
        """The CLS output [rows, width] over the states [rows, states, hidden]."""
        kind = self.project.weight.dtype
        tokens = torch.cat((self.cls.expand(len(states), 1, -1), states.to(kind)), 1)
        encoded: Tensor = self.encoder(self.project(tokens))
        return encoded[:, 0]

    def chosen(self, seen: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Shape and rate [rows] for one next token per row of the CLS outputs [rows, width]."""
        alpha = (seen * self.alpha.weight[tokens]).sum(-1)
        rate = (seen * self.rate.weight[tokens]).sum(-1)
        return positive(alpha.float(), rate.float())


def positive(alpha: Tensor, rate: Tensor) -> tuple[Tensor, Tensor]:
    """Softplus of both; a shape above MOST_ALPHA is scaled down with its rate, so that the mean stays."""
    alpha, rate = softplus(alpha), softplus(rate)
    excess = (alpha / MOST_ALPHA).clamp(min=1.0)
    return alpha / excess, rate / excess


def gamma_nll(alpha: Tensor, rate: Tensor, x: Tensor) -> Tensor:
    """Negative log density of Gamma(alpha, rate) at x > 0, in nats, element by element."""
    return torch.lgamma(alpha) - alpha * rate.log() - (alpha - 1) * x.log() + rate * x
