"""What a trained model can do, on fresh problems of the evaluation split; every number of a card comes from here."""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Protocol

from tokenizers import Tokenizer

from thinkserve.strategies.text import boxed
from thinkserve.train.data import spans_of
from thinkserve.train.side_tasks import Document, exists, forced, judge, same
from thinkserve.train.tasks import KINDS, Level, Problem, problems

RESAMPLES = 2000
VERDICT = re.compile(r"(?:Yes|No)\b")


@dataclass(frozen=True, slots=True)
class Trial:
    """One sampled solution: right or not, its answer, its length in tokens."""

    problem: Problem
    answer: str | None
    tokens: int

    @property
    def right(self) -> bool:
        """Whether the answer is the problem's."""
        return self.problem.check(self.answer)


def wilson(hits: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """95% interval of a proportion."""
    if n == 0:
        return 0.0, 1.0
    share, scale = hits / n, 1 + z * z / n
    middle = (share + z * z / (2 * n)) / scale
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / scale
    return middle - half, middle + half


def rate(hits: Sequence[bool]) -> dict[str, float]:
    """A proportion with its interval."""
    low, high = wilson(sum(hits), len(hits))
    return {"value": round(sum(hits) / max(1, len(hits)), 4), "low": round(low, 4), "high": round(high, 4)}


def pass_rate(groups: Sequence[Sequence[bool]]) -> dict[str, float]:
    """Share of right chains, `groups` holding those of one problem each; a 95% interval by resampling problems.

    Chains of one problem are right or wrong together far more often than by chance. Bounds are 0 and 1 without groups.
    """
    shares = [sum(group) / len(group) for group in groups]
    if not shares:
        return {"value": 0.0, "low": 0.0, "high": 1.0}
    rng = random.Random(0)
    draws = sorted(fmean(rng.choices(shares, k=len(shares))) for _ in range(RESAMPLES))
    edge = RESAMPLES // 40
    return {"value": round(fmean(shares), 4), "low": round(draws[edge], 4), "high": round(draws[-edge - 1], 4)}


class Sampler(Protocol):
    """Something that completes token prompts, eos included."""

    def __call__(self, prompts: list[list[int]], *, temperature: float, seed: int, most: int = 2048) -> list[list[int]]:
        """One completion per prompt."""
        ...


class Evaluation:
    """One model under test."""

    def __init__(self, sample: Sampler, tokenizer: Tokenizer, seed: int = 1000) -> None:
        self.sample, self.tokenizer, self.seed = sample, tokenizer, seed

    def prompt(self, document: Document) -> list[int]:
        """Tokens up to where the model takes over."""
        kept: list[int] = []
        spans = list(spans_of(document))
        border = next(i for i, (text, _) in enumerate(spans) if text.endswith(("<think>\n", "</think>\n\n")))
        for text, _ in spans[: border + 1]:
            kept += self.tokenizer.encode(text, add_special_tokens=False).ids
        return kept

    def solve(self, tasks: list[Problem], temperature: float, words: str = "") -> list[Trial]:
        """One solution per problem; `words` are added to the question."""
        prompts = [self.prompt(Document(f"{p.question} {words}".strip(), (), "")) for p in tasks]
        written = self.sample(prompts, temperature=temperature, seed=self.seed)
        return [Trial(p, self.boxed(tokens), len(tokens)) for p, tokens in zip(tasks, written, strict=True)]

    def boxed(self, tokens: list[int]) -> str | None:
        """The last boxed answer of a completion."""
        return boxed(self.tokenizer.decode(tokens))

    def main(self, level: Level, n: int, k: int = 8) -> dict[str, Any]:
        """Greedy and sampled figures on `n` problems, with votes over `k` chains."""
        tasks = problems(level, n, self.seed)
        greedy = self.solve(tasks, 0.0)
        flat = self.solve([p for p in tasks for _ in range(k)], 0.7)
        chains = [flat[i : i + k] for i in range(0, len(flat), k)]
        kinds = {kind: [group for group in chains if group[0].problem.kind == kind] for kind in KINDS}
        return {
            "level": level,
            "problems": n,
            "greedy_pass@1": rate([t.right for t in greedy]),
            "pass@1": pass_rate(rights(chains)),
            f"majority@{k}": rate([vote(group) for group in chains]),
            f"short-1@{k}": rate([vote(shortest(group, 1)) for group in chains]),
            f"short-3@{k}": rate([vote(shortest(group, 3)) for group in chains]),
            "finished": round(sum(t.answer is not None for t in flat) / len(flat), 4),
            "mean_tokens": mean(flat),
            "mean_tokens_right": mean([t for t in flat if t.right]),
            "mean_tokens_wrong": mean([t for t in flat if not t.right]),
            "by_kind": {kind: pass_rate(rights(groups)) for kind, groups in kinds.items()},
        }

    def brief(self, level: Level, n: int) -> dict[str, Any]:
        """The concise mode, asked for in the prompt."""
        trials = self.solve(problems(level, n, self.seed + 1), 0.7, "Be brief.")
        return {"pass@1": rate([t.right for t in trials]), "mean_tokens": mean(trials)}

    def side(self, make: Callable[[Problem, random.Random], Document], level: Level, n: int) -> dict[str, float]:
        """Share of right replies to a side task (greedy)."""
        rng = random.Random(self.seed)
        documents = [make(p, rng) for p in problems(level, n, self.seed + 2)]
        prompts = [self.full(d) for d in documents]
        written = self.sample(prompts, temperature=0.0, seed=self.seed, most=400)
        replies = [self.tokenizer.decode(tokens).strip() for tokens in written]
        return rate([counted(reply) == counted(d.answer) for reply, d in zip(replies, documents, strict=True)])

    def full(self, document: Document) -> list[int]:
        """Tokens up to the answer, the thinking included."""
        spans = list(spans_of(document))[:-2]
        return [token for text, _ in spans for token in self.tokenizer.encode(text, add_special_tokens=False).ids]

    def report(self, n: int = 500) -> dict[str, Any]:
        """Everything that goes on the card."""
        sides = {"states_result": exists, "same_result": same, "judge": judge, "forced_answer": forced}
        return {
            "medium": self.main("medium", n),
            "easy": self.main("easy", max(1, n // 5)),
            "hard": self.main("hard", max(1, n // 5)),
            "brief_medium": self.brief("medium", n),
            "side_tasks": {name: self.side(make, "medium", max(1, n // 2)) for name, make in sides.items()},
        }


def counted(reply: str) -> str:
    """What counts of a reply: all of it, or its Yes or No, the only word of one that verifiers read."""
    verdict = VERDICT.match(reply)
    return verdict[0] if verdict else reply


def vote(trials: list[Trial]) -> bool:
    """Whether the most frequent answer is right; of equals the one with the shortest chain."""
    votes = Counter(t.answer for t in trials if t.answer is not None)
    if not votes:
        return False
    best = max(votes.values())
    leaders = [t for t in trials if t.answer is not None and votes[t.answer] == best]
    return min(leaders, key=lambda t: t.tokens).right


def rights(groups: Sequence[Sequence[Trial]]) -> list[list[bool]]:
    """Which chains of each problem are right."""
    return [[trial.right for trial in group] for group in groups]


def shortest(trials: list[Trial], m: int) -> list[Trial]:
    """The `m` shortest chains that came to an answer."""
    return sorted((t for t in trials if t.answer is not None), key=lambda t: t.tokens)[:m]


def mean(trials: list[Trial]) -> float:
    """Mean length in tokens."""
    return round(sum(t.tokens for t in trials) / max(1, len(trials)), 1)
