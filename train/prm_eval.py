"""How well the reward model tells right steps from wrong ones, on fresh chains of a model that errs by itself."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer

from thinkserve.strategies.text import boxed
from thinkserve.train.evaluate import Trial, pass_rate, rate, rights, vote
from thinkserve.train.model import IGNORE, rotations
from thinkserve.train.prm import RewardModel
from thinkserve.train.prm_chains import Chain
from thinkserve.train.prm_data import encode_steps
from thinkserve.train.tasks import KINDS, Level

TOKENS = 8192  # read at once
RESAMPLES = 200
DEPTHS = ((1, 2), (3, 4), (5, 6), (7, 8), (9, 12), (13, 20), (21, 10**6))
AGGREGATES: dict[str, Callable[[Sequence[float]], float]] = {
    "last": lambda rewards: rewards[-1],
    "min": min,
    "prod": math.prod,
    "mean": lambda rewards: sum(rewards) / len(rewards),
}


@dataclass(frozen=True, slots=True)
class Scored:
    """A chain with the reward and the label of each of its steps, as many as fit into the model's context."""

    chain: Chain
    rewards: tuple[float, ...]
    right: tuple[bool, ...]

    @property
    def first_pass(self) -> int:
        """How many steps there are up to the first wrong one, or in all."""
        return self.right.index(False) + 1 if False in self.right else len(self.right)


@dataclass(frozen=True, slots=True)
class Verdict:
    """One step as it is counted: where it comes from, at what depth (from 1), its reward, its label."""

    problem: str
    kind: str
    level: Level
    depth: int
    reward: float
    right: bool
    early: bool  # no wrong step lies before it


def score(model: RewardModel, tokenizer: Tokenizer, chains: Sequence[Chain], longest: int = 2048) -> list[Scored]:
    """Read every chain once."""
    rows = [encode_steps(tokenizer, chain, longest) for chain in chains]
    angles = rotations(longest, model.model.shape.head_dim)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]), reverse=True)
    found: dict[int, Scored] = {}
    while order:
        width = len(rows[order[0]][0])
        taken, order = order[: max(1, TOKENS // width)], order[max(1, TOKENS // width) :]
        ids = torch.tensor([rows[i][0] + [0] * (width - len(rows[i][0])) for i in taken])
        with torch.inference_mode():
            rewards = model.rewards(ids, angles[0][:width], angles[1][:width])
        for at, i in enumerate(taken):
            found[i] = _scored(chains[i], rows[i][1], rewards[at].tolist())
    return [found[i] for i in range(len(rows))]


def _scored(chain: Chain, labels: list[int], rewards: list[float]) -> Scored:
    """Rewards at the ends of steps."""
    ends = [at for at, label in enumerate(labels) if label != IGNORE]
    return Scored(chain, tuple(rewards[at] for at in ends), tuple(bool(labels[at]) for at in ends))


def verdicts(scored: Iterable[Scored]) -> list[Verdict]:
    """All steps of all chains."""
    found = []
    for one in scored:
        problem = one.chain.problem
        for depth, (reward, right) in enumerate(zip(one.rewards, one.right, strict=True), 1):
            early = depth <= one.first_pass
            found.append(Verdict(problem.question, problem.kind, problem.level, depth, reward, right, early))
    return found


def auroc(steps: Sequence[Verdict]) -> float:
    """How likely a right step gets more than a wrong one (ties count half); NaN without both."""
    ranks, at = 0.0, 0
    ordered = sorted(steps, key=lambda step: step.reward)
    right = sum(step.right for step in steps)
    while at < len(ordered):
        end = at
        while end < len(ordered) and ordered[end].reward == ordered[at].reward:
            end += 1
        ranks += (at + end + 1) / 2 * sum(step.right for step in ordered[at:end])
        at = end
    pairs = right * (len(steps) - right)
    return (ranks - right * (right + 1) / 2) / pairs if pairs else math.nan


def measured(steps: Sequence[Verdict], resample: bool = True) -> dict[str, float]:
    """AUROC with a 95% interval by resampling problems (steps of one problem are no independent draws)."""
    groups: dict[str, list[Verdict]] = defaultdict(list)
    for step in steps:
        groups[step.problem].append(step)
    rng, names = random.Random(0), sorted(groups)
    draws = sorted(
        auroc([step for name in rng.choices(names, k=len(names)) for step in groups[name]])
        for _ in range(RESAMPLES if resample and names else 0)
    )
    bounds = {"low": round(draws[5], 4), "high": round(draws[-6], 4)} if draws else {}
    share = round(sum(step.right for step in steps) / max(1, len(steps)), 4)
    return {"value": round(auroc(steps), 4), **bounds, "steps": len(steps), "right": share}


def by(key: Callable[[Verdict], Hashable], steps: Sequence[Verdict]) -> dict[str, list[Verdict]]:
    """The steps in groups, by the key's text."""
    groups: dict[str, list[Verdict]] = defaultdict(list)
    for step in steps:
        groups[str(key(step))].append(step)
    return groups


def depth_of(step: Verdict) -> str:
    """The step's range of depths."""
    low, high = next(bounds for bounds in DEPTHS if bounds[0] <= step.depth <= bounds[1])
    return f"{low}-{high}" if high < 10**6 else f"{low} on"


def calibration(steps: Sequence[Verdict]) -> list[dict[str, float]]:
    """Mean reward against the share of right steps, in tenths of the reward."""
    groups = by(lambda step: min(9, int(step.reward * 10)), steps)
    return [
        {
            "from": int(name) / 10,
            "steps": len(group),
            "reward": round(sum(step.reward for step in group) / len(group), 4),
            "right": round(sum(step.right for step in group) / len(group), 4),
        }
        for name, group in sorted(groups.items())
    ]


def calibration_error(steps: Sequence[Verdict]) -> float:
    """Expected calibration error over tenths."""
    cells = calibration(steps)
    total = sum(cell["steps"] for cell in cells)
    return round(sum(cell["steps"] * abs(cell["reward"] - cell["right"]) for cell in cells) / max(1, total), 4)


def chosen(group: Sequence[Scored], aggregate: Callable[[Sequence[float]], float]) -> bool:
    """Whether the chain with the best aggregate, among those with an answer, is right."""
    finished = [one for one in group if trial(one).answer is not None and one.rewards]
    return bool(finished) and trial(max(finished, key=lambda one: aggregate(one.rewards))).right


def trial(one: Scored) -> Trial:
    """The chain as evaluate.py counts it."""
    return Trial(one.chain.problem, boxed(one.chain.text), len(one.chain.text))


def selection(scored: Sequence[Scored]) -> dict[str, dict[str, float]]:
    """Accuracy of the best of k chains by each aggregate, beside one chain and the majority of the same chains."""
    groups: dict[str, list[Scored]] = defaultdict(list)
    for one in scored:
        groups[one.chain.problem.question].append(one)
    best = {f"best by {name}": rate([chosen(g, rule) for g in groups.values()]) for name, rule in AGGREGATES.items()}
    trials = [[trial(one) for one in group] for group in groups.values()]
    return {
        "pass@1": pass_rate(rights(trials)),
        "majority": rate([vote(group) for group in trials]),
        **best,
        "any right": rate([any(group) for group in rights(trials)]),
    }


def report(scored: Sequence[Scored]) -> dict[str, Any]:
    """Everything that goes on the card, of k chains for each problem."""
    steps = verdicts(scored)
    levels = sorted({step.level for step in steps})
    depths = by(depth_of, steps)
    names = [f"{low}-{high}" if high < 10**6 else f"{low} on" for low, high in DEPTHS]
    return {
        "chains": len(scored),
        "problems": len({step.problem for step in steps}),
        "auroc": measured(steps),
        "first_mistakes": measured([step for step in steps if step.early]),
        "by_kind": {kind: measured(group) for kind in KINDS if (group := by(lambda s: s.kind, steps).get(kind))},
        "by_level": {level: measured(by(lambda s: s.level, steps)[level]) for level in levels},
        "by_depth": {
            name: measured(group) | {"reward": mean(group), "calibration_error": calibration_error(group)}
            for name in names
            if (group := depths.get(name))
        },
        "calibration": calibration(steps),
        "calibration_error": calibration_error(steps),
        "selection": {level: selection([s for s in scored if s.chain.problem.level == level]) for level in levels},
    }


def mean(steps: Sequence[Verdict]) -> float:
    """Mean reward."""
    return round(sum(step.reward for step in steps) / max(1, len(steps)), 4)
