"""RAP: reasoning as planning, Monte-Carlo tree search with the model's own opinion as reward (arXiv:2305.14992).

    `iterations` times:
        select:   from the root the child with the highest  Q(c) + w * sqrt(ln N / max(1, n(c)))  until there is none
        roll out: propose steps, go on with the one of highest reward, until a solution is complete
        back up:  every node on the way notes the mean reward from itself to the end; Q is the best so far noted
    the complete solution with the highest mean reward answers, or all of them vote with it

The reward of a step is  useful ** alpha * confidence ** (1 - alpha).  `useful` is the verifier's P(Yes) against P(No)
when it is asked whether the step is useful. In the paper the model judges itself: name it as the verifier.

The paper plans with sub-questions: a sub-question is an action, the answer that most samples agree on gives the next
state, their share is the confidence. A reasoning model's step is question and answer in one, so it is proposed
`samples` times: steps with the same result (the last number, else the words) are one action, and their share of all
samples is its confidence. Both factors are then known at once, and there is no preliminary ("fast") reward.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from math import exp, isnan, log, sqrt
from typing import Literal

from pydantic import Field

from thinkserve.strategies.around import Around, Open
from thinkserve.strategies.engine import Answer, Delta, Emit, Engine, Event, Job, Stream, Task
from thinkserve.strategies.errors import LOST, EngineDead
from thinkserve.strategies.registry import Supports, strategy
from thinkserve.strategies.rewards import mean
from thinkserve.strategies.streams import Through
from thinkserve.strategies.text import answer_of, final_number
from thinkserve.strategies.together import together
from thinkserve.strategies.tree import Tree
from thinkserve.strategies.tree_budget import TreeOptions, limits
from thinkserve.strategies.tree_choice import Select, conclude
from thinkserve.strategies.tree_node import Node
from thinkserve.strategies.verifier import Verifier, filled

ASK = "Question: {question}\nWork so far:\n{work}\nNext step:\n{step}\nIs the next step useful? Answer Yes or No."
UNDECIDED = 0.5


class RapOptions(TreeOptions):
    """Parameters of RAP."""

    samples: int = Field(default=4, ge=1, le=64, description="Proposals at a node; those with one result are one step.")
    iterations: int = Field(default=10, ge=1, le=256, description="How often a solution is selected and rolled out.")
    w: float = Field(default=1.0, ge=0, le=100, allow_inf_nan=False, description="How much exploration counts.")
    alpha: float = Field(
        default=0.5, ge=0, le=1, allow_inf_nan=False, description="Usefulness against confidence in a step's reward."
    )
    select: Select = Field(default="best", description="The best solution answers, or a weighted or plain vote.")
    ask: str = Field(
        default=ASK, max_length=4000, description="What the verifier is asked; names {question}, {work} and {step}."
    )
    on_verifier_error: Literal["continue", "fail"] = Field(
        default="continue",
        description="If the verifier fails: a step is undecided, or the request ends with its error.",
    )

    def chains(self) -> int:
        """The proposals of one node are written side by side."""
        return self.samples


@strategy(
    "rap",
    title="RAP",
    options=RapOptions,
    reference="arXiv:2305.14992",
    roles=("target", "verifier"),
    supports=Supports(parts=True),
)
async def run(task: Task, engine: Engine, emit: Emit, options: RapOptions) -> Answer:
    """Monte-Carlo tree search rewarded by usefulness, as a yes or no question, and by agreement of samples."""
    tree = Tree(task, engine, emit, limits(task, engine, options))
    plan = Plan(tree, options)
    await tree.start()
    for _ in range(options.iterations):
        if not tree.over:
            await plan.iterate()
    leaves = [node for node in plan.rewards if node.terminal]
    return await conclude(tree, leaves, [], options.select, weight=plan.merit)


class Plan:
    """What is known of the nodes: rewards of the steps, actions behind them, and the means noted by each roll-out."""

    def __init__(self, tree: Tree, options: RapOptions) -> None:
        self.rewards: dict[Node, float] = {}
        self.actions: dict[Node, Sequence[Node]] = {}
        self.noted: dict[Node, list[float]] = {}
        self._tree, self._options = tree, options
        self._verifier = Verifier(_Asked(tree), tree.task.question)

    async def iterate(self) -> None:
        """Select, roll out, back up."""
        way = [self._tree.root]
        while actions := self.actions.get(way[-1]):
            way.append(self.choose(way[-1], actions))
        while way[-1].open and (actions := await self._expand(way[-1])):
            way.append(max(actions, key=self.rewards.__getitem__))
        self.back_up(way)

    def choose(self, parent: Node, actions: Sequence[Node]) -> Node:
        """The action with the highest upper confidence bound; before its first visit its reward stands for Q."""
        visits = log(len(self.noted[parent]))

        def bound(node: Node) -> float:
            noted = self.noted.get(node, [])
            return max(noted, default=self.rewards[node]) + self._options.w * sqrt(visits / max(1, len(noted)))

        return max(actions, key=bound)

    def back_up(self, way: Sequence[Node]) -> None:
        """Every node notes the mean reward from itself to the end of the way; the root is no step."""
        rewards = [self.rewards.get(node, 0.0) for node in way]
        for at, node in enumerate(way):
            self.noted.setdefault(node, []).append(mean(rewards[max(1, at) :]))

    def merit(self, node: Node) -> float:
        """Mean reward of the whole path; 0 for what was never judged."""
        return mean([self.rewards.get(each, 0.0) for each in node.line[1:]])

    async def _expand(self, node: Node) -> Sequence[Node]:
        steps = [step for step in await self._tree.propose({node: self._options.samples}) if not step.dead]
        confidence = agreement(steps)
        for step in steps:
            if step not in confidence:
                await self._tree.prune(step, "same result")
        useful = await self._useful(list(confidence))
        for step, share in confidence.items():
            reward = useful.get(step, UNDECIDED) ** self._options.alpha * share ** (1 - self._options.alpha)
            self.rewards[step] = reward
            await self._tree.emit(Event("node.scored", None, {"node": step.id, "reward": round(reward, 4)}))
        self.actions[node] = list(confidence)
        return self.actions[node]

    async def _useful(self, steps: Sequence[Node]) -> Mapping[Node, float]:
        if self._tree.ended is not None:
            return {}
        return dict(zip(steps, await together(self._ask, steps), strict=True))

    async def _ask(self, step: Node) -> float:
        tree, work = self._tree, "".join(step.path[: -len(step.steps) or None])
        parts = {"question": tree.task.question, "work": work.strip(), "step": step.text.strip()}
        try:
            odds = await self._verifier.ask(filled(self._options.ask, **parts))
        except EngineDead:
            raise
        except LOST as error:
            if self._options.on_verifier_error == "fail" and tree.ended is None:
                raise
            tree.warn(f"a step was not judged: {error}")
            return UNDECIDED
        return UNDECIDED if isnan(odds) else chance(odds)


class _Asked(Around):
    """What the verifier is asked through: what it writes is counted, and a question cut off ends the search."""

    def __init__(self, tree: Tree) -> None:
        super().__init__(tree.engine)
        self._tree = tree

    @asynccontextmanager
    async def watch(self, open: Open, job: Job) -> AsyncIterator[Stream]:
        async with open(job) as stream:
            yield _Heard(stream, self._tree)
        # The verifier's one word is on the request's bill; none is written once the request has ended.
        self._tree.spent.passes += stream.generated > 0
        self._tree.spent.tokens += stream.generated


class _Heard(Through):
    __slots__ = ("_tree",)

    def __init__(self, inner: Stream, tree: Tree) -> None:
        super().__init__(inner)
        self._tree = tree

    async def __anext__(self) -> Delta:
        delta = await super().__anext__()
        if delta.finish in {"ceiling", "deadline"}:
            self._tree.ended = delta.finish
        return delta


def chance(odds: float) -> float:
    """The probability that has these log-odds (nats), however large they are."""
    power = exp(-abs(odds))
    return (1.0 if odds >= 0 else power) / (1 + power)


def agreement(steps: Sequence[Node]) -> dict[Node, float]:
    """One step for each result that occurs, the first, with the share of all samples that agree on it."""
    firsts: dict[tuple[bool, str], Node] = {}
    shares: dict[Node, float] = {}
    total = sum(step.count for step in steps)
    for step in steps:
        result = (answer_of(step.text) if step.terminal else final_number(step.text)) or " ".join(step.text.split())
        first = firsts.setdefault((step.terminal, result), step)
        shares[first] = shares.get(first, 0.0) + step.count / total
    return shares
