"""Who writes what is compared and measured: one method, behind which the engine that will serve can stand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

# [hidden] float32 per block, counted from 0; added to the block's output.
Vectors = Mapping[int, Tensor]


@dataclass(frozen=True, slots=True)
class Written:
    """One completion: all its tokens, and those of its thinking (before the closing tag; all when it never closes)."""

    tokens: list[int]
    thinking: list[int]
    closed: bool


class Writer(Protocol):
    """Writes completions, steered or not."""

    def write(
        self,
        prompts: Sequence[list[int]],
        vectors: Vectors | None = None,
        scale: float = 0.0,
        *,
        temperature: float = 0.0,
        seed: int = 0,
        most: int = 1024,
    ) -> list[Written]:
        """A completion of at most `most` tokens per prompt, in their order; temperature 0 is greedy.

        `scale * vector` is added at each prompt's last token and all that follow it. Every prompt has a seed of its
        own, from `seed` and its place.
        """


def split(tokens: Sequence[int], close: int | None, ends: Sequence[int]) -> Written:
    """What was written, its thinking told apart by the token that closes it; `ends` are the model's end tokens."""
    closed = close in tokens
    end = tokens.index(close) if close is not None and closed else len(tokens)
    return Written(list(tokens), [token for token in tokens[:end] if token not in ends], closed)
