"""The controls: data that changes decoding inside the engine, for one job and nobody else.

A strategy or a modifier puts them into `Job.controls`; the adapter resolves names and sends them along; the worker
turns them into kernels. Controls of one kind add up in the order given.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from thinkserve.strategies.engine import Control

Positions = Literal["generated", "thinking"]


@dataclass(frozen=True, slots=True)
class Steer(Control):
    """Add `scale` times a registered steering vector to the residual stream (ASC, arXiv:2507.04742, section 4).

    Acts on the last prompt token and every generated one; with positions "thinking" only up to the end of thinking.
    `layers` are the blocks whose output is changed, counted from 0; empty: those that the vector was made for.
    """

    vector: str
    scale: float = 1.0
    layers: tuple[int, ...] = ()
    positions: Positions = "generated"


@dataclass(frozen=True, slots=True)
class Guide(Control):
    """Budget guidance: steer the remaining thinking towards `budget` tokens, line by line (arXiv:2506.13752).

    `budget` counts thinking tokens from the start of the job. It is soft: a hard end is `Job.thinking_budget`.
    """

    budget: int

    def later(self, written: int) -> Guide:
        """Guided to what is left of the budget, at least one token."""
        return Guide(max(1, self.budget - written))
