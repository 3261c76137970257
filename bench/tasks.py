"""The bench's questions, and what a client has to do itself with vLLM's server: count tokens, extract answers, vote.

Problems are the generators' evaluation split: fresh, with exact answers, never seen in training. Extraction and
vote are the server's own code, so that a client that votes loses nothing to a worse parser.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from tokenizers import Tokenizer as Fast

from thinkserve.strategies.text import answer_of
from thinkserve.strategies.voting import Ballot
from thinkserve.strategies.voting import vote as count
from thinkserve.train.tasks import Level, Problem, problems

__all__ = ["Problem", "Tokenizer", "correct", "load", "vote"]


def load(level: str, n: int, seed: int) -> list[Problem]:
    """`n` different problems of the evaluation split. ValueError when there is no such level."""
    levels: tuple[Level, ...] = get_args(Level)
    for known in levels:
        if known == level:
            return problems(known, n, seed, split="eval")
    raise ValueError(f"no level {level!r}; there are {', '.join(levels)}")


def correct(problem: Problem, content: str) -> bool:
    """Whether the answer in a message's content is the right one, by the problem's exact check."""
    return problem.check(answer_of(content))


async def vote(contents: Sequence[str], lengths: Sequence[int]) -> int:
    """Index of the content that wins the vote; `lengths` of the thinking break ties, as in the server."""
    ballots = [
        Ballot(index, length, answer_of(content))
        for index, (content, length) in enumerate(zip(contents, lengths, strict=True))
    ]
    return (await count(ballots)).winner.index


class Tokenizer:
    """Counts the tokens of text that came without a count."""

    def __init__(self, model: str) -> None:
        self._fast: Fast = Fast.from_file(str(Path(model) / "tokenizer.json"))

    def answer(self, content: str) -> int:
        """Tokens of an answer, its end-of-sequence token included; 0 when there is none."""
        return len(self._fast.encode(content, add_special_tokens=False).ids) + 1 if content else 0
