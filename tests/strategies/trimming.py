"""A verifier that watches: scripts that think in thoughts with results, and one who is asked about them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from thinkserve.strategies.engine import Answer, Job, Task
from thinkserve.strategies.testing import Recorder, ScriptedEngine, play

PROMPT = "q<think>"
Says = Callable[[str], str]
OFF: dict[str, Any] = {"underthinking": False, "repetition": False}


def honest(prompt: str) -> str:
    """What a good verifier says: does an excerpt state a result; are two results the same?"""
    results = re.findall(r"answer is (\w+)", prompt)
    if "Second excerpt" in prompt:
        return "Yes" if results[0] == results[1] else "No"
    return "Yes" if results else "No"


def thought(result: str, number: int = 0) -> str:
    """A thought that turns round, thinks, and states a result or none."""
    said = f"So the answer is {result}.\n\n" if result else "So I do not know yet.\n\n"
    return f"Wait, this is look number {number} at the whole of it. Now then.\n\n{said}"


def thinking(results: str) -> str:
    return "".join(thought("" if each == "-" else each, number) for number, each in enumerate(results))


class Watched(ScriptedEngine):
    """Writes one script, and answers as a verifier; `says` is asked for every reply."""

    def __init__(self, script: str, says: Says = honest, **more: Any) -> None:
        self.asked: list[str] = []

        def write(job: Job, _: int) -> str:
            if job.role == "target":
                return script
            self.asked.append(self.decode(job.prompt))
            return says(self.asked[-1])

        super().__init__(write, roles=("target", "verifier"), **more)


async def trim(engine: ScriptedEngine, task: Task | None = None, **options: Any) -> tuple[Answer, Recorder, str]:
    """The strategy at work; its text with the closing tag."""
    answer, out = await play("trimr", engine, task or task_for(engine), **options)
    assert [] == engine.live
    assert answer.tokens == out.tokens
    text = "".join("</think>" if token == 2 else engine.decode([token]) for token in answer.tokens)
    return answer, out, text


def task_for(engine: ScriptedEngine, max_tokens: int = 9000, **more: Any) -> Task:
    return Task(engine.encode(PROMPT), max_tokens, question="1+1?", **more)


def verdicts(out: Recorder) -> list[tuple[Any, ...]]:
    told = [event.data for event in out.events if event.type == "verifier"]
    return [(each["thought"], each["exists"], each["same"], each["count"]) for each in told]


def endings(out: Recorder) -> list[tuple[Any, Any]]:
    return [(event.data["rule"], event.data["ending"]) for event in out.events if event.type == "budget.forced"]
