"""Problems of the embedded family, generated fresh, with exact answers: chained operations, expressions, swaps.

Every question belongs to exactly one split, by a hash of its text: training never sees a question that an evaluation
can ask. Pure standard library; the bench draws its problems here as well.
"""

from __future__ import annotations

import ast
import operator
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal

Kind = Literal["chain", "expression", "swaps"]
Level = Literal["easy", "medium", "hard"]
Split = Literal["train", "eval"]
KINDS: tuple[Kind, ...] = ("chain", "expression", "swaps")
EVAL_SHARE = 16  # one question in sixteen belongs to evaluation
LIMITS: dict[Level, int] = {"easy": 99, "medium": 999, "hard": 999}  # values stay within 0 and this

OPERATIONS: dict[str, Callable[[int, int], int]] = {"+": operator.add, "-": operator.sub, "*": operator.mul}
VERBS = {"+": "Add", "-": "Subtract", "*": "Multiply by"}
PEOPLE = ("Ann", "Bob", "Cid", "Dan", "Eve")
OBJECTS = ("ball", "book", "cup", "key", "pen")

# Number of operations (chain, expression) or of swaps, inclusive ranges per level.
STEPS: dict[Kind, dict[Level, tuple[int, int]]] = {
    "chain": {"easy": (2, 3), "medium": (4, 6), "hard": (7, 10)},
    "expression": {"easy": (2, 3), "medium": (4, 5), "hard": (6, 8)},
    "swaps": {"easy": (2, 3), "medium": (4, 6), "hard": (7, 10)},
}


@dataclass(frozen=True, slots=True)
class Problem:
    """A question, its exact answer, and the derivation that the trace writer needs.

    `steps` are (left, operator, right, result) for arithmetic and (person, "swaps", person, "") for swaps.
    """

    kind: Kind
    level: Level
    question: str
    answer: str
    start: tuple[str, ...]
    steps: tuple[tuple[str, str, str, str], ...]

    def check(self, answer: str | None) -> bool:
        """Whether an extracted answer is the right one."""
        return answer is not None and answer.strip().lower() == self.answer.lower()


def split_of(question: str) -> Split:
    """The only split that may hold this question."""
    digest = blake2b(question.encode(), digest_size=8).digest()
    return "eval" if int.from_bytes(digest, "big") % EVAL_SHARE == 0 else "train"


def generate(kind: Kind, level: Level, rng: random.Random, split: Split = "train", steps: int | None = None) -> Problem:
    """A fresh problem of that kind and level from the split; of so many steps, if it is to be longer than its level."""
    while True:
        low, high = STEPS[kind][level] if steps is None else (steps, steps)
        problem = _MAKERS[kind](level, rng.randint(low, high), rng)
        if split_of(problem.question) == split:
            return problem


def problems(level: Level, n: int, seed: int, split: Split = "eval", kinds: tuple[Kind, ...] = KINDS) -> list[Problem]:
    """`n` different problems, the kinds in turn; the same arguments give the same problems."""
    rng = random.Random(f"{split}/{level}/{seed}")
    found: dict[str, Problem] = {}
    while len(found) < n:
        problem = generate(kinds[len(found) % len(kinds)], level, rng, split)
        found[problem.question] = problem
    return list(found.values())


def evaluate(expression: str) -> int:
    """Exact value of a bracketed expression in +, -, *; raises ValueError on anything else."""

    def value(node: ast.expr) -> int:
        match node:
            case ast.Constant(value=int(number)):
                return number
            case ast.BinOp(left=left, op=op, right=right):
                symbol = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*"}.get(type(op))
                if symbol:
                    return OPERATIONS[symbol](value(left), value(right))
        raise ValueError(f"not an arithmetic expression: {expression!r}")

    return value(ast.parse(expression, mode="eval").body)


def _operation(left: int, limit: int, rng: random.Random) -> tuple[str, int, int]:
    """An operation on `left` that stays within 0..limit: symbol, operand, result."""
    symbol = rng.choice("+-*")
    factors = [f for f in range(2, 10) if 0 < left * f <= limit]
    if symbol == "*" and factors:
        right = rng.choice(factors)
    elif (symbol == "-" and left >= 2) or left > limit - 2:
        symbol, right = "-", rng.randint(1, min(99, left))
    else:
        symbol, right = "+", rng.randint(2, min(99, limit - left))
    return symbol, right, OPERATIONS[symbol](left, right)


def _chain(level: Level, n: int, rng: random.Random) -> Problem:
    start = value = rng.randint(2, 60)
    steps, words = [], [f"Start with {start}."]
    for _ in range(n):
        symbol, right, result = _operation(value, LIMITS[level], rng)
        steps.append((str(value), symbol, str(right), str(result)))
        words.append(f"{VERBS[symbol]} {right}.")
        value = result
    return Problem("chain", level, " ".join([*words, "What is the result?"]), str(value), (str(start),), tuple(steps))


def _expression(level: Level, n: int, rng: random.Random) -> Problem:
    text, value, steps = _tree(n, LIMITS[level], rng)
    shown = text[1:-1] if text.startswith("(") else text
    return Problem("expression", level, f"Compute {shown}.", str(value), (shown,), tuple(steps))


def _tree(n: int, limit: int, rng: random.Random) -> tuple[str, int, list[tuple[str, str, str, str]]]:
    """A random bracketed expression of `n` operations whose values all stay within 0..limit."""
    if n == 0:
        number = rng.randint(2, 9) if rng.random() < 0.3 else rng.randint(2, 60)
        return str(number), number, []
    while True:
        left_n = rng.randint(0, n - 1)
        left, a, left_steps = _tree(left_n, limit, rng)
        right, b, right_steps = _tree(n - 1 - left_n, limit, rng)
        symbols = [s for s in "+-" if 0 <= OPERATIONS[s](a, b) <= limit]
        symbols += ["*", "*"] if min(a, b) < 10 and a * b <= limit else []
        if symbols:
            symbol = rng.choice(symbols)
            result = OPERATIONS[symbol](a, b)
            step = (str(a), symbol, str(b), str(result))
            return f"({left}{symbol}{right})", result, [*left_steps, *right_steps, step]


def _swaps(level: Level, n: int, rng: random.Random) -> Problem:
    size = {"easy": 3, "medium": 4, "hard": 5}[level]
    people = rng.sample(PEOPLE, size)
    objects = rng.sample(OBJECTS, size)
    holds = dict(zip(people, objects, strict=True))
    words = [", ".join(f"{p} has the {o}" for p, o in holds.items()) + "."]
    start = tuple(f"{p} {o}" for p, o in holds.items())
    steps = []
    for _ in range(n):
        a, b = rng.sample(people, 2)
        holds[a], holds[b] = holds[b], holds[a]
        words.append(f"{a} and {b} swap.")
        steps.append((a, "swaps", b, ""))
    person = rng.choice(people)
    question = " ".join([*words, f"What does {person} have?"])
    return Problem("swaps", level, question, holds[person], start, tuple(steps))


_MAKERS: dict[Kind, Callable[[Level, int, random.Random], Problem]] = {
    "chain": _chain,
    "expression": _expression,
    "swaps": _swaps,
}


def asked_person(problem: Problem) -> str:
    """Whose object a swaps question asks for."""
    found = re.search(r"What does (\w+) have\?", problem.question)
    if found is None:
        raise ValueError(f"not a swaps question: {problem.question!r}")
    return found[1]
