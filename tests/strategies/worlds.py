"""Worlds for tree searches: tables of what may be written where, and what that is worth, played by ScriptedEngine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

import anyio

from thinkserve.strategies.engine import Answer, Job, Path, Role, Score, Task
from thinkserve.strategies.testing import Recorder, ScriptedEngine, play

PROMPT = "q<think></think>"
SEARCHES = ("a-star", "beam", "dvts", "rebase", "particle", "mcts", "rap")
REWARDED = SEARCHES[:-1]
# Parameters with which each search is quick.
SMALL: dict[str, dict[str, Any]] = {
    "a-star": {"k": 2},
    "beam": {"n": 4, "m": 2},
    "dvts": {"n": 4, "m": 2},
    "rebase": {"width": 4},
    "particle": {"n": 4},
    "mcts": {"width": 2, "simulations": 2},
    "rap": {"samples": 2, "iterations": 3},
}


class World(ScriptedEngine):
    """Writes `steps[text so far]`, one continuation after the other; what is not in the table ends the solution.

    `rewards` are by the whole text; `tired` scorings are answered, then time is over (or there is
    another `ailment`).
    """

    def __init__(
        self,
        steps: Mapping[str, Sequence[str]] | Callable[[str], Sequence[str]],
        rewards: Mapping[str, float] | Callable[[str], float] = {},
        *,
        tired: int | None = None,
        ailment: Exception | None = None,
        prompt: str = PROMPT,
        **more: Any,
    ) -> None:
        self.visits: Counter[str] = Counter()
        self.asked = 0
        self.tired, self.ailment = tired, ailment or TimeoutError("deadline")
        self.start = prompt
        self._table = steps if callable(steps) else lambda text: steps.get(text, ("",))
        worth = rewards if callable(rewards) else lambda text: rewards.get(text, 0.5)
        more.setdefault("roles", ("target", "reward", "verifier"))
        super().__init__(self._continuation, rate=lambda steps: worth("".join(steps)), **more)

    def _continuation(self, job: Job, index: int) -> str:
        if job.role != "target":
            return "{"  # neither yes nor no
        text = self.behind(job)
        self.visits[text] += 1
        choices = self._table(text)
        return choices[(self.visits[text] - 1) % len(choices)]

    def behind(self, job: Job) -> str:
        """What a job of the target goes on from."""
        return self.decode(job.prompt[len(self.encode(self.start)) :])

    def task(self, max_tokens: int = 200, **more: Any) -> Task:
        """A question to this world, generation starting in the answer unless told otherwise."""
        return Task(self.encode(self.start), max_tokens, **({"phase": "answer"} | more))

    async def score(self, question: str, paths: Sequence[Path], role: Role = "reward") -> list[Score]:
        """The rewards, as long as nothing is in the way."""
        # Counted as they begin: several may be at work.
        self.asked += 1
        if self.tired is not None and self.asked > self.tired:
            raise self.ailment
        return await super().score(question, paths, role)


def search(name: str, world: World, task: Task | None = None, **options: object) -> tuple[Answer, Recorder]:
    """Run a strategy in a world, all live jobs ended afterwards."""

    async def go() -> tuple[Answer, Recorder]:
        return await play(name, world, task or world.task(), **options)

    answer, out = anyio.run(go)
    assert [] == world.live
    return answer, out


def text_of(world: World, answer: Answer) -> str:
    """What was answered."""
    return world.decode(answer.tokens)


def told(out: Recorder, type: str) -> list[Mapping[str, object]]:
    """What the events of one type say."""
    return [event.data for event in out.events if event.type == type]


def binary(depth: int) -> dict[str, tuple[str, ...]]:
    """All paths of `depth` steps, L or R each, and then an answer."""
    paths = ["".join(f"{turn}\n\n" for turn in turns) for size in range(depth) for turns in product("LR", repeat=size)]
    return dict.fromkeys(paths, ("L\n\n", "R\n\n"))


def preferring(good: str) -> Callable[[str], float]:
    """Rewards of a model that knows the right turns."""
    path = "".join(f"{turn}\n\n" for turn in good)

    def reward(text: str) -> float:
        return 0.9 if path.startswith(text) or text.startswith(path) else 0.1

    return reward
