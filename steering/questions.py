"""Questions with exact checkers: from a file, or fresh ones from the generators of the embedded family."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thinkserve.steering.vector_file import BadVector
from thinkserve.strategies.text import boxed

BRIEF = "Be brief."


@dataclass(frozen=True, slots=True)
class Question:
    """A question and its answer, if that is known; `concise` and `verbose` are thoughts that a writer has given it."""

    text: str
    answer: str | None = None
    concise: str | None = None
    verbose: str | None = None

    @property
    def brief(self) -> str:
        """The same question, asking for brevity: the free alternative to any vector."""
        return f"{self.text} {BRIEF}"

    def check(self, completion: str) -> bool:
        """Whether the last boxed answer is the right one; ValueError when there is nothing to compare with."""
        if self.answer is None:
            raise ValueError(f"no answer is known to: {self.text[:60]}")
        found = boxed(completion)
        return found is not None and found.strip().lower() == self.answer.strip().lower()


def from_file(file: Path) -> list[Question]:
    """Questions of a JSON Lines file: "question", and "answer", "concise", "verbose" as far as known.

    Raises BadVector naming the line that is none.
    """
    found: list[Question] = []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadVector(f"cannot read {file}: {getattr(error, 'strerror', 'not text')}") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                found.append(_question(json.loads(line)))
            except (ValueError, TypeError, KeyError) as error:
                raise BadVector(f"line {number} of {file} is no question: {error}") from None
    if not found:
        raise BadVector(f"there is no question in {file}")
    return found


def from_tasks(level: str, n: int, seed: int, *, held_out: bool) -> list[Question]:
    """`n` fresh problems of a level (easy, medium, hard); held-out ones are never among those for extraction."""
    from thinkserve.train import tasks

    if level not in tasks.LIMITS:
        raise BadVector(f"no tasks {level!r}; there are: {', '.join(tasks.LIMITS)}")
    drawn = tasks.problems(level, n, seed, "eval" if held_out else "train")
    return [Question(problem.question, problem.answer) for problem in drawn]


def sample(questions: Sequence[Question], n: int, seed: int) -> list[Question]:
    """At most `n` of them."""
    return random.Random(seed).sample(list(questions), min(n, len(questions)))


def _question(entry: Any) -> Question:
    if not isinstance(entry, dict):
        raise TypeError("it is not an object")
    known = {name: entry.get(name) for name in ("answer", "concise", "verbose")}
    wrong = [name for name, value in known.items() if not isinstance(value, str | int | None)]
    if not isinstance(entry["question"], str) or wrong:
        raise TypeError(f"{wrong[0] if wrong else 'question'} must be text")
    return Question(entry["question"], **{name: None if v is None else str(v) for name, v in known.items()})
