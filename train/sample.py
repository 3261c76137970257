"""Batched sampling from a model in training: every row starts at position 0 and advances one token per step.

Rows whose prompt is longer simply start to sample later, so no padding is needed; finished rows are dropped from the
batch as soon as they are half of it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from thinkserve.train.model import Attention, Model, rotate, rotations


class Cache:
    """Keys and values of all layers for a batch: [batch, kv heads, time, head_dim] each."""

    def __init__(self, model: Model, batch: int, length: int) -> None:
        shape = model.shape
        size = (batch, shape.kv_heads, length, shape.head_dim)
        device = model.embed_tokens.weight.device
        self.keys = [torch.zeros(size, device=device) for _ in range(shape.layers)]
        self.values = [torch.zeros(size, device=device) for _ in range(shape.layers)]

    def select(self, rows: Tensor) -> None:
        """Keep these rows only."""
        self.keys = [key[rows] for key in self.keys]
        self.values = [value[rows] for value in self.values]


def attend(layer: Attention, x: Tensor, at: int, keys: Tensor, values: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """One position of attention over the cache, which receives this position's key and value."""
    batch = x.shape[0]
    cos, sin = (a[at : at + 1] for a in angles)
    heads = (batch, 1, -1, layer.shape.head_dim)
    q = rotate(layer.q_norm(layer.q_proj(x).view(heads)).transpose(1, 2), cos, sin)
    keys[:, :, at : at + 1] = rotate(layer.k_norm(layer.k_proj(x).view(heads)).transpose(1, 2), cos, sin)
    values[:, :, at : at + 1] = layer.v_proj(x).view(heads).transpose(1, 2)
    mixed = F.scaled_dot_product_attention(q, keys[:, :, : at + 1], values[:, :, : at + 1], enable_gqa=True)
    out: Tensor = layer.o_proj(mixed.transpose(1, 2).reshape(batch, 1, -1))
    return out


def logits_at(model: Model, ids: Tensor, at: int, cache: Cache, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Logits [batch, vocabulary] after the tokens `ids` [batch] at position `at`."""
    x = model.embed_tokens(ids)[:, None]
    for index, layer in enumerate(model.blocks()):
        normed = layer.input_layernorm(x)
        x = x + attend(layer.self_attn, normed, at, cache.keys[index], cache.values[index], angles)
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return F.linear(model.norm(x)[:, 0], model.embed_tokens.weight)


@torch.no_grad()
def sample(
    model: Model,
    prompts: list[list[int]],
    eos: int,
    *,
    temperature: float,
    seed: int,
    most: int = 1024,
    batch: int = 512,
) -> list[list[int]]:
    """Completions, eos included, of at most `most` tokens each; temperature 0 is greedy."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    generator = torch.Generator(model.embed_tokens.weight.device).manual_seed(seed)
    done: dict[int, list[int]] = {}
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        found = _sample_batch(model, [prompts[i] for i in rows], eos, temperature, generator, most)
        done.update(zip(rows, found, strict=True))
    return [done[i] for i in range(len(prompts))]


def _sample_batch(
    model: Model, prompts: list[list[int]], eos: int, temperature: float, generator: torch.Generator, most: int
) -> list[list[int]]:
    length = max(map(len, prompts)) + most
    device = model.embed_tokens.weight.device
    cache, angles = Cache(model, len(prompts), length), rotations(length, model.shape.head_dim, device)
    written: list[list[int]] = [[] for _ in prompts]
    live = list(range(len(prompts)))
    current = [prompt[0] for prompt in prompts]
    for at in range(length - 1):
        logits = logits_at(model, torch.tensor([current[i] for i in live], device=device), at, cache, angles)
        drawn = _draw(logits, temperature, generator)
        for row, token in zip(live, drawn, strict=True):
            if at + 1 < len(prompts[row]):
                current[row] = prompts[row][at + 1]
            elif not _over(written[row], eos, most):
                written[row].append(token)
                current[row] = token
        kept = [n for n, row in enumerate(live) if not _over(written[row], eos, most)]
        if not kept:
            break
        if len(kept) <= len(live) // 2:
            cache.select(torch.tensor(kept, device=device))
            live = [live[n] for n in kept]
    return written


def _over(tokens: list[int], eos: int, most: int) -> bool:
    return len(tokens) >= most or (bool(tokens) and tokens[-1] == eos)


def _draw(logits: Tensor, temperature: float, generator: torch.Generator) -> list[int]:
    if temperature == 0.0:
        found: list[int] = logits.argmax(-1).tolist()
        return found
    weights = torch.softmax(logits / temperature, -1)
    drawn: list[int] = torch.multinomial(weights, 1, generator=generator)[:, 0].tolist()
    return drawn
