"""The stream of training tokens: documents drawn from the mixture, encoded span by span, batched by length."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer

from thinkserve.train.model import IGNORE
from thinkserve.train.side_tasks import (
    Document,
    continued,
    direct,
    drill,
    exists,
    forced,
    judge,
    same,
    solve,
    summary,
)
from thinkserve.train.tasks import KINDS, Level, Problem, generate

Maker = Callable[[Problem, random.Random], Document]
POOL = 16  # batches that are sorted together

# Share of documents per task, after bare practice: arithmetic takes a hundred thousand sums to learn, which a million
# tokens of drills hold, and ten million of solutions.
MIXTURE: tuple[tuple[Maker, float], ...] = (
    (solve, 0.47),
    (drill, 0.15),
    (direct, 0.05),
    (exists, 0.04),
    (same, 0.09),
    (continued, 0.04),
    (forced, 0.05),
    (summary, 0.03),
    (judge, 0.08),
)


@dataclass(frozen=True, slots=True)
class Curriculum:
    """Shares of easy, medium and hard problems, moving from `begin` to `end` in the first `ramp` of the training.

    The first `practice` of it is bare practice.
    """

    begin: tuple[float, float, float] = (0.8, 0.2, 0.0)
    end: tuple[float, float, float] = (0.2, 0.6, 0.2)
    ramp: float = 0.4
    practice: float = 0.15

    def draw(self, progress: float, rng: random.Random) -> Level:
        """A level at `progress` in [0, 1]."""
        at = min(1.0, progress / self.ramp)
        weights = [a + (b - a) * at for a, b in zip(self.begin, self.end, strict=True)]
        levels: tuple[Level, ...] = ("easy", "medium", "hard")
        return rng.choices(levels, weights)[0]


def draw_document(rng: random.Random, progress: float, curriculum: Curriculum) -> Document:
    """One document of the mixture."""
    practice = progress < curriculum.practice
    maker = drill if practice else rng.choices([m for m, _ in MIXTURE], [w for _, w in MIXTURE])[0]
    problem = generate(rng.choice(KINDS), curriculum.draw(progress, rng), rng, "train")
    return maker(problem, rng)


def spans_of(document: Document) -> Iterator[tuple[str, bool]]:
    """The document as the chat template would write it; True where loss is taken."""
    if document.system:
        yield f"<|im_start|>system\n{document.system}<|im_end|>\n", False
    prompt = f"<|im_start|>user\n{document.user}<|im_end|>\n<|im_start|>assistant\n<think>\n"
    if document.thinking is None:
        yield prompt + "\n</think>\n\n", False
    else:
        yield prompt, False
        yield from document.thinking
        yield document.close, document.learn_close
        yield "\n\n", True
    yield f"{document.answer}<|im_end|>", True
    yield "\n", False


def encode(tokenizer: Tokenizer, document: Document) -> tuple[list[int], list[int]]:
    """Token ids and labels (IGNORE where no loss is taken), not yet shifted."""
    ids: list[int] = []
    labels: list[int] = []
    for text, learn in spans_of(document):
        piece = tokenizer.encode(text, add_special_tokens=False).ids
        ids += piece
        labels += piece if learn else [IGNORE] * len(piece)
    return ids, labels


class Batcher:
    """Batches of whole documents of like length, so that no document sees another and little is padding.

    Every document starts at position 0, as it does when the model is served. Resumable through its state.
    """

    def __init__(
        self, tokenizer: Tokenizer, tokens: int, longest: int, seed: int, curriculum: Curriculum | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.tokens = tokens
        self.longest = longest
        self.rng = random.Random(seed)
        self.curriculum = curriculum or Curriculum()
        self.waiting: list[list[tuple[list[int], list[int]]]] = []

    def batch(self, progress: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and shifted labels, both [documents, time] int64; about `tokens` in all, IGNORE on the padding."""
        if not self.waiting:
            self._fill(progress)
        rows = self.waiting.pop()
        width = max(len(ids) for ids, _ in rows)
        inputs = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows])
        labels = torch.tensor([known + [IGNORE] * (width - len(known)) for _, known in rows])
        return inputs[:, :-1], labels[:, 1:]

    def draw(self, progress: float) -> tuple[list[int], list[int]]:
        """The next document: ids and labels, the labels not yet shifted."""
        return encode(self.tokenizer, draw_document(self.rng, progress, self.curriculum))

    def _fill(self, progress: float) -> None:
        """A pool of documents, sorted by length, cut into batches, in random order."""
        pool: list[tuple[list[int], list[int]]] = []
        while sum(len(row[0]) for row in pool) < POOL * self.tokens:
            ids, labels = self.draw(progress)
            if len(ids) <= self.longest:
                pool.append((ids, labels))
        pool.sort(key=lambda row: len(row[0]), reverse=True)
        while pool:
            count = max(1, self.tokens // len(pool[0][0]))
            self.waiting.append(pool[:count])
            del pool[:count]
        self.rng.shuffle(self.waiting)

    def state(self) -> dict[str, Any]:
        """What `restore` needs to go on with the very next batch."""
        return {"rng": self.rng.getstate(), "waiting": self.waiting}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken."""
        self.rng.setstate(state["rng"])
        self.waiting = list(state["waiting"])
