"""A Writer that writes what it is told, and remembers what it was asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from thinkserve.steering.writer import Vectors, Writer, Written


@dataclass(frozen=True, slots=True)
class Call:
    """One call of `write`."""

    prompts: list[list[int]]
    vectors: Vectors
    scale: float
    temperature: float
    seed: int
    most: int


class ScriptedWriter(Writer):
    """`script(prompt, scale)` is what a prompt is answered under a scale."""

    def __init__(self, script: Callable[[list[int], float], Written]) -> None:
        self._script = script
        self.calls: list[Call] = []

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
        self.calls.append(Call(list(prompts), vectors or {}, scale, temperature, seed, most))
        return [self._script(prompt, scale) for prompt in prompts]
