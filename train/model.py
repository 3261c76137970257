"""A compact Qwen3 for training: the same parameters, names and arithmetic as Hugging Face's, without its options.

Attention is causal with rotary positions and normalised queries and keys; the embedding is tied to the output.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen3Config

ROPE_THETA = 100_000.0
NORM_EPS = 1e-6
CONTEXT = 4096
IGNORE = -100  # the label of a token that carries no loss


def default_device() -> str:
    """Where training runs unless told otherwise."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True, slots=True)
class Shape:
    """Size of a member of the family."""

    name: str
    hidden: int
    layers: int
    feed_forward: int
    heads: int
    kv_heads: int
    head_dim: int = 32
    vocabulary: int = 640


SHAPES = {
    "small": Shape("arith-small", hidden=128, layers=6, feed_forward=384, heads=4, kv_heads=2),
    "large": Shape("arith-large", hidden=256, layers=6, feed_forward=768, heads=8, kv_heads=4),
}


class Attention(nn.Module):
    """Grouped-query attention over [batch, time, hidden]."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        wide, narrow = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden, wide, bias=False)
        self.k_proj = nn.Linear(shape.hidden, narrow, bias=False)
        self.v_proj = nn.Linear(shape.hidden, narrow, bias=False)
        self.o_proj = nn.Linear(wide, shape.hidden, bias=False)
        self.q_norm = nn.RMSNorm(shape.head_dim, NORM_EPS)
        self.k_norm = nn.RMSNorm(shape.head_dim, NORM_EPS)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Attend; `cos` and `sin` are [time, head_dim / 2]."""
        batch, time, _ = x.shape
        heads = (batch, time, -1, self.shape.head_dim)
        q = rotate(self.q_norm(self.q_proj(x).view(heads).float()).transpose(1, 2), cos, sin)
        k = rotate(self.k_norm(self.k_proj(x).view(heads).float()).transpose(1, 2), cos, sin)
        v = self.v_proj(x).view(heads).transpose(1, 2)
        group = self.shape.heads // self.shape.kv_heads
        k, v = k.repeat_interleave(group, 1).to(v.dtype), v.repeat_interleave(group, 1)
        mixed = F.scaled_dot_product_attention(q.to(v.dtype), k, v, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, time, -1))  # type: ignore[no-any-return]


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.feed_forward, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.feed_forward, bias=False)
        self.down_proj = nn.Linear(shape.feed_forward, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Position-wise map."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


class Layer(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(shape.hidden, NORM_EPS)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden, NORM_EPS)
        self.mlp = FeedForward(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Attention and feed-forward, each added to the stream."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))  # type: ignore[no-any-return]


class Learner(nn.Module):
    """What the training loop trains; `shape` is its own, or that of the model inside it."""

    shape: Shape

    def loss(self, ids: Tensor, labels: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Mean cross-entropy in nats over the labels that are not IGNORE; ids and labels are [batch, time]."""
        return F.cross_entropy(self(ids, cos, sin).float().flatten(0, 1), labels.flatten())


class Model(Learner):
    """The trunk and the tied head; parameter names follow Hugging Face's below the prefix `model.`."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocabulary, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.hidden, NORM_EPS)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                depth = math.sqrt(2 * shape.layers) if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
                nn.init.normal_(weight, std=0.4 / math.sqrt(weight.shape[1]) / depth)

    def blocks(self) -> list[Layer]:
        """The layers, typed."""
        return [layer for layer in self.layers if isinstance(layer, Layer)]

    def states(self, ids: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Normed final states [batch, time, hidden] for ids [batch, time]."""
        x: Tensor = self.embed_tokens(ids)
        for layer in self.blocks():
            x = layer(x, cos, sin)
        return self.norm(x)  # type: ignore[no-any-return]

    def forward(self, ids: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Logits [batch, time, vocabulary] for ids [batch, time]."""
        return F.linear(self.states(ids, cos, sin), self.embed_tokens.weight)


def rotations(length: int, head_dim: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles, both [length, head_dim / 2]."""
    frequency = ROPE_THETA ** (-torch.arange(0, head_dim, 2, device=device) / head_dim)
    angle = torch.arange(length, device=device)[:, None] * frequency[None]
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves of the last axis, as Qwen does."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def hf_config(shape: Shape, eos: int, pad: int) -> Qwen3Config:
    """The same model in Hugging Face's words."""
    return Qwen3Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=CONTEXT,
        rope_theta=ROPE_THETA,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        rms_norm_eps=NORM_EPS,
        tie_word_embeddings=True,
        eos_token_id=eos,
        bos_token_id=None,
        pad_token_id=pad,
        dtype="bfloat16",
    )
