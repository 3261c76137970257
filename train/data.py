"""The stream of training tokens: documents drawn from the mixture, encoded span by span, batched by length."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from tokenizers import Tokenizer

from thinkserve.train.model import IGNORE
from thinkserve.train.practice import recall, sums, track
from thinkserve.train.side_tasks import Document, continued, direct, exists, forced, judge, same, solve, summary
from thinkserve.train.tasks import KINDS, Level, Problem, generate
from thinkserve.train.traces import DEFAULT, Habits

Maker = Callable[[Problem, random.Random], Document]
Mixture = tuple[tuple[Maker, float], ...]
POOL = 16  # batches that are sorted together

# One skill after another, until which share of the training: to look up comes within a hundred thousand tokens if
# nothing else is asked, and hardly ever once sums are there; sums want a million in any case.
LESSONS: tuple[tuple[float, Mixture], ...] = (
    (0.018, ((recall, 1.0),)),
    (0.063, ((track, 0.6), (recall, 0.4))),
    (0.29, ((sums, 0.9), (track, 0.05), (recall, 0.05))),
)
# What a model begins with that has room for more than it was given: sums that the small one never got quite right.
REFRESHER: tuple[tuple[float, Mixture], ...] = ((0.10, LESSONS[-1][1]),)


def mixture(habits: Habits) -> Mixture:
    """Share of documents per task, with reasoning of these habits."""
    return (
        (partial(solve, habits=habits), 0.52),
        (sums, 0.10),
        (recall, 0.03),
        (direct, 0.05),
        (exists, 0.04),
        (same, 0.05),
        (partial(continued, habits=habits), 0.05),
        (partial(forced, habits=habits), 0.06),
        (partial(summary, habits=habits), 0.03),
        (judge, 0.07),
    )


@dataclass(frozen=True, slots=True)
class Curriculum:
    """Bare practice first, then the mixture.

    Shares of easy, medium and hard problems move from `begin` to `end` in the first `ramp` of the training.
    """

    begin: tuple[float, float, float] = (0.8, 0.2, 0.0)
    end: tuple[float, float, float] = (0.2, 0.6, 0.2)
    ramp: float = 0.4
    lessons: tuple[tuple[float, Mixture], ...] = LESSONS
    habits: Habits = DEFAULT

    def draw(self, progress: float, rng: random.Random) -> Level:
        """A level at `progress` in [0, 1]."""
        at = min(1.0, progress / self.ramp)
        weights = [a + (b - a) * at for a, b in zip(self.begin, self.end, strict=True)]
        levels: tuple[Level, ...] = ("easy", "medium", "hard")
        return rng.choices(levels, weights)[0]

    def tasks(self, progress: float) -> Mixture:
        """What is learned at `progress`."""
        return next((lesson for end, lesson in self.lessons if progress < end), mixture(self.habits))


def draw_document(rng: random.Random, progress: float, curriculum: Curriculum) -> Document:
    """One document for `progress` in [0, 1]."""
    makers, shares = zip(*curriculum.tasks(progress), strict=True)
    problem = generate(rng.choice(KINDS), curriculum.draw(progress, rng), rng, "train")
    maker: Maker = rng.choices(makers, shares)[0]
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
