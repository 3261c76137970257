"""Bare practice, before any reasoning: sums, and who has what. Many results per token, and only they are learned.

What a solution is made of takes about a hundred thousand examples to learn, whatever stands around it. Solutions hold
so many in ten million tokens, practice in one.
"""

from __future__ import annotations

import random

from thinkserve.train.side_tasks import Document, boxed
from thinkserve.train.tasks import OPERATIONS, Problem, generate
from thinkserve.train.traces import CAREFUL, Span, write_trace

SUMS = "Work out each of them."
RECALL = "Who has what?"
COUNT = (4, 14)  # results in a document
LIMITS = (99, 999, 999)  # a sum's result is at most one of these


def sums(_problem: Problem, rng: random.Random) -> Document:
    """Sums without a story."""
    spans: list[Span] = []
    for index in range(rng.randint(*COUNT)):
        text, result = _sum(rng.choice(LIMITS), rng)
        spans += [(("\n\n" if index else "") + f"{text}=", False), (str(result), True)]
    return Document(SUMS, tuple(spans), "Done.")


def recall(_problem: Problem, rng: random.Random) -> Document:
    """Looking up, again and again, what somebody has."""
    holds = generate("swaps", rng.choice(("easy", "medium", "hard")), rng).start
    spans: list[Span] = [(", ".join(holds), False)]
    for _ in range(rng.randint(*COUNT)):
        person, thing = rng.choice(holds).split()
        spans += [(f"\n\n{person}", False), (f" {thing}", True)]
    return Document(RECALL, tuple(spans), "Done.")


def track(_problem: Problem, rng: random.Random) -> Document:
    """Few swaps in few words."""
    problem = generate("swaps", rng.choice(("easy", "medium")), rng, "train")
    spans, answer = write_trace(problem, "concise", rng, CAREFUL)
    return Document(problem.question, tuple(spans), boxed(answer))


def _sum(limit: int, rng: random.Random) -> tuple[str, int]:
    while True:
        left, symbol = rng.randint(0, limit), rng.choice("+-*")
        right = rng.randint(2, 9) if symbol == "*" else rng.randint(1, 99)
        left = left // right if symbol == "*" else left
        result = OPERATIONS[symbol](left, right)
        if 0 <= result <= limit:
            return f"{left}{symbol}{right}", result
