"""Particle filtering: solutions are samples, thinned out and copied by their weights (arXiv:2502.01618).

    n particles at the root
    repeat until all are complete: every open particle is continued by one step
        weight of a particle = its potential, normalised over all of them, complete ones included
        if 1 / sum of squared weights < threshold * n, or some came to a dead end: resample n from the weights
    the heaviest answers, or the particles vote

The potential is r / (1 - r) of the reward r ("odds", what the authors' its_hub does), exp(r) ("softmax", the paper's
algorithm 1), or, without a reward model, exp(mean log-probability of the last step) ("self"). Resampling is systematic:
one random number, and every particle is copied its expected number of times, rounded up or down. The paper resamples
after every step (threshold 1 comes close to that); the effective sample size as a trigger keeps particles apart while
their weights are alike (from its_hub's entropic particle filter).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import exp, fsum, log
from random import Random
from typing import Literal

from pydantic import Field

from thinkserve.strategies.engine import Answer, Emit, Engine, Role, Task
from thinkserve.strategies.errors import EngineDead, EngineFailed, Unsupported
from thinkserve.strategies.registry import strategy
from thinkserve.strategies.rewards import RewardOptions
from thinkserve.strategies.tree import Tree
from thinkserve.strategies.tree_budget import TreeOptions, limits
from thinkserve.strategies.tree_choice import Select, conclude
from thinkserve.strategies.tree_node import Node, slots

Weights = Literal["odds", "softmax", "self"]
SURE = 1e-7


class ParticleOptions(RewardOptions, TreeOptions):
    """Parameters of particle filtering."""

    n: int = Field(default=8, ge=1, le=64, description="How many particles.")
    weights: Weights | None = Field(
        default=None,
        description="Odds or softmax of rewards, or self: the model's own log-probabilities, without a reward model. "
        "Left out, odds where there is a reward model, else self.",
    )
    threshold: float = Field(
        default=0.5, ge=0, le=1, allow_inf_nan=False, description="Resample below this share of effective particles."
    )
    select: Select = Field(
        default="best", description="Which particle answers: the heaviest (best), or by vote, weighted or plain."
    )

    def chains(self) -> int:
        """All particles move at once."""
        return self.n

    def roles(self) -> Mapping[str, Role]:
        """A reward model where rewards are asked for; who asks for nothing gets on without."""
        return {"weights": "reward"} if self.weights in ("odds", "softmax") else {}


@strategy("particle", title="Particle filtering", options=ParticleOptions, reference="arXiv:2502.01618")
async def run(task: Task, engine: Engine, emit: Emit, options: ParticleOptions) -> Answer:
    """n solutions grow step by step and are resampled by their weights, with or without a reward model."""
    lacking = None if options.weights == "self" else await lack(engine, task.question)
    kind = options.weights or ("self" if lacking else "odds")
    gone = isinstance(lacking, EngineFailed)
    if lacking is not None and (options.weights is not None or (gone and options.on_reward_error == "fail")):
        raise lacking
    bounds = limits(task, engine, options)
    if kind == "self":
        # Nothing is scored, so nothing is bounded by it.
        bounds = replace(bounds, passes=None)
    tree = Tree(task, engine, emit, bounds, options, logprobs=kind == "self")
    if gone:
        tree.warn("the reward model is not available; particles weigh what their own log-probabilities say")
    rng = Random(task.seed)
    particles = [await tree.start()] * options.n

    def potential(node: Node) -> float:
        return log_potential(kind, tree.value(node), node.own.logprobs)

    while any(node.open for node in particles) and not tree.over:
        moving = Counter(node for node in particles if node.open)
        steps = await (tree.propose(moving) if kind == "self" else tree.expand(moving))
        particles = [node for node in particles if not node.open] + slots(steps)
        if tree.ended is None:
            # A dead end is no sample, unless there is nothing else.
            particles = [node for node in particles if node.terminal or node.open] or particles
        weights = normalised([potential(node) for node in particles])
        lost = len(particles) < options.n and any(node.open for node in particles)
        if weights and (lost or effective(weights) < options.threshold * options.n):
            particles = await _resampled(tree, particles, systematic(weights, options.n, rng.random()))
    # A limit may strike when every solution has been resampled away.
    weighed = particles if any(node.terminal for node in particles) else tree.solutions or particles
    weight = dict(zip(weighed, normalised([potential(node) for node in weighed]), strict=True))
    leaves = [node for node in weighed if node.terminal]
    return await conclude(
        tree,
        leaves,
        particles,
        options.select,
        # A round that failed as a whole leaves no particles; then all ends are compared.
        weight=lambda node: weight.get(node, exp(potential(node))),
        decided=not any(node.open for node in particles),
    )


async def _resampled(tree: Tree, particles: Sequence[Node], counts: Sequence[int]) -> list[Node]:
    kept = [node for node, copies in zip(particles, counts, strict=True) for _ in range(copies)]
    for node in dict.fromkeys(particles):
        if node not in kept:
            await tree.prune(node, "resampled")
    return kept


async def lack(engine: Engine, question: str) -> EngineFailed | Unsupported | None:
    """Why there is nothing to be had of a reward model, if so: a score of no path tells whether it is there."""
    try:
        engine.info("reward")
        await engine.score(question, [])
    except EngineDead:
        raise
    except (EngineFailed, Unsupported) as error:
        return error
    except TimeoutError:
        pass  # The request has ended already, and whoever writes will hear of it.
    return None


def log_potential(kind: Weights, reward: float, logprobs: Sequence[float]) -> float:
    """Logarithm of a particle's weight before normalisation; 0 for a step without log-probabilities."""
    if kind == "self":
        return fsum(logprobs) / len(logprobs) if logprobs else 0.0
    clipped = min(max(reward, SURE), 1 - SURE)
    return log(clipped / (1 - clipped)) if kind == "odds" else reward


def normalised(logs: Sequence[float]) -> list[float]:
    """Weights that sum to 1."""
    top = max(logs, default=0.0)
    raw = [exp(value - top) for value in logs]
    return [value / fsum(raw) for value in raw]


def effective(weights: Sequence[float]) -> float:
    """The effective sample size of normalised weights: n when they are equal, 1 when one has everything."""
    return 1 / fsum(weight * weight for weight in weights)


def systematic(weights: Sequence[float], n: int, start: float) -> list[int]:
    """Copies of each particle: how many of the points (start + i) / n, i < n, fall into its share of [0, 1)."""
    counts, total, taken = list[int](), 0.0, 0
    for weight in weights:
        total += weight
        upto = taken
        while upto < n and (start + upto) / n < total:
            upto += 1
        counts.append(upto - taken)
        taken = upto
    # Rounding may leave the last point behind the sum of all weights.
    counts[-1] += n - taken
    return counts
