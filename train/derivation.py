"""How each kind of problem is worked out, one step at a time, with or without a slip.

A derivation knows its state; `advance` performs the next step and returns it as an equation (or, for swaps, as an
assignment). With `slip` the result is perturbed and everything afterwards follows from it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from thinkserve.train.tasks import OBJECTS, OPERATIONS, VERBS, Kind, Problem, asked_person

INTEGER = re.compile(r"-?\d+")
INNERMOST = re.compile(r"\((-?\d+)([+*-])(-?\d+)\)|^(-?\d+)([+*-])(-?\d+)$")


@dataclass(frozen=True, slots=True)
class Step:
    """One step as text: what leads to it, the part that is certain, the part that can be wrong, how hard it is.

    `state` is what is left after it (of an expression), and as wrong as the result.
    """

    lead: str
    given: str
    result: str
    hard: bool = False
    state: str = ""

    @property
    def equation(self) -> str:
        """The step in symbols, without its state."""
        return self.given + self.result

    @property
    def outcome(self) -> str:
        """The result, and the state where there is one."""
        return self.result + self.state

    @property
    def full(self) -> str:
        """The step in symbols, with its state."""
        return self.given + self.outcome


class Derivation(Protocol):
    """A problem being worked out."""

    @property
    def length(self) -> int:
        """Number of steps in all."""
        ...

    @property
    def value(self) -> str:
        """What the state says the answer is (the running value before the end)."""
        ...

    def advance(self, rng: random.Random, slip: bool = False) -> Step:
        """Do the next step."""
        ...


def derive(problem: Problem) -> Derivation:
    """A derivation at its first step."""
    kinds: dict[Kind, Callable[[Problem], Derivation]] = {"chain": Chain, "expression": Expression, "swaps": Swaps}
    return kinds[problem.kind](problem)


def slipped(result: int, rng: random.Random) -> int:
    """A plausible wrong value near the right one."""
    wrong = result + rng.choice((-1, 1, -2, 2, -10, 10, -20, 20, -100, 100))
    return wrong if wrong >= 0 or result < 0 else result + 10


def is_hard(left: int, symbol: str, right: int) -> bool:
    """Steps on which a small model is likelier to slip: products beyond the tables, carries over a hundred."""
    if symbol == "*":
        return min(left, right) > 1 and max(left, right) > 12
    low, high = sorted((left, OPERATIONS[symbol](left, right)))
    return high - low > 9 and low // 100 != high // 100


class Chain:
    """Operations applied one after another to a start value."""

    def __init__(self, problem: Problem) -> None:
        self._todo = [(symbol, int(right)) for _, symbol, right, _ in problem.steps]
        self.length = len(self._todo)
        self._value = int(problem.start[0])

    @property
    def value(self) -> str:
        """The running value."""
        return str(self._value)

    def advance(self, rng: random.Random, slip: bool = False) -> Step:
        """Apply the next operation."""
        symbol, right = self._todo.pop(0)
        left, result = self._value, OPERATIONS[symbol](self._value, right)
        self._value = slipped(result, rng) if slip else result
        return Step(
            f"{VERBS[symbol].lower()} {right}", f"{left}{symbol}{right}=", self.value, is_hard(left, symbol, right)
        )


class Expression:
    """The leftmost innermost bracket is replaced by its value until a number is left."""

    def __init__(self, problem: Problem) -> None:
        self.value = problem.start[0]
        self.length = len(problem.steps)

    def advance(self, rng: random.Random, slip: bool = False) -> Step:
        """Work out the next bracket."""
        found = INNERMOST.search(self.value)
        if found is None:
            raise ValueError(f"nothing left to work out in {self.value!r}")
        left, symbol, right = (g for g in found.groups() if g is not None)
        a, b = int(left), int(right)
        result = OPERATIONS[symbol](a, b)
        shown = str(slipped(result, rng) if slip else result)
        self.value = self.value[: found.start()] + shown + self.value[found.end() :]
        equation, rest = f"{left}{symbol}{right}", "" if INTEGER.fullmatch(self.value) else f", leaving {self.value}"
        return Step(f"work out {equation}", f"{equation}=", shown, is_hard(a, symbol, b), rest)


class Swaps:
    """Who holds what, after each swap."""

    def __init__(self, problem: Problem) -> None:
        self._holds = dict(entry.split() for entry in problem.start)
        self._todo = [(a, b) for a, _, b, _ in problem.steps]
        self.length = len(self._todo)
        self.asked = asked_person(problem)

    @property
    def value(self) -> str:
        """What the person asked about holds now."""
        return self._holds[self.asked]

    @property
    def found(self) -> str:
        """The person asked about and what they hold: the last look-up, made visible."""
        return f"{self.asked} {self.value}"

    @property
    def state(self) -> str:
        """Everybody and what they hold."""
        return ", ".join(f"{p} {o}" for p, o in self._holds.items())

    def advance(self, rng: random.Random, slip: bool = False) -> Step:
        """Perform the next swap; a slip gives one of the two a wrong object."""
        a, b = self._todo.pop(0)
        before = f"{a} {self._holds[a]}, {b} {self._holds[b]}"
        self._holds[a], self._holds[b] = self._holds[b], self._holds[a]
        if slip:
            victim = rng.choice((a, b))
            self._holds[victim] = rng.choice([o for o in OBJECTS if o != self._holds[victim]])
        return Step(f"{a} and {b} swap", f"{before} become", f" {a} {self._holds[a]}, {b} {self._holds[b]}")
