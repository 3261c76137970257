"""AnswerStops: stop strings that act on the answer only; a thought may hold them.

The engine's own stop strings act anywhere, so the answer is decoded here and its stream ended with the token that
completes a string. Installed only when a request has stop strings: it looks at every token.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

from thinkserve.strategies.around import Around, Open
from thinkserve.strategies.engine import Delta, Engine, Job, Stream, Task, Tokens
from thinkserve.strategies.streams import Ended, Through, parted
from thinkserve.strategies.text import Phases, Stops


class AnswerStops(Around):
    """Ends what writes the completion with "stop" once its answer contains one of the task's strings."""

    def __init__(self, inner: Engine, task: Task) -> None:
        super().__init__(inner)
        self._task = task

    @asynccontextmanager
    async def watch(self, open: Open, job: Job) -> AsyncIterator[Stream]:
        """Run a job and look for the strings in what it answers."""
        known = len(self._task.prompt)
        if job.role not in ("target", "guide") or job.prompt[:known] != self._task.prompt:
            async with open(job) as stream:
                yield stream
            return
        matcher = Matcher(self._inner, self._task)
        # What a chain has written so far is part of its answer.
        if matcher.find(job.prompt[known:]) is not None:
            yield Ended("stop")
            return
        async with open(job) as stream:
            yield _Stopping(stream, matcher)


class Matcher:
    """Follows one chain from the prompt on."""

    def __init__(self, engine: Engine, task: Task) -> None:
        self._phases = Phases(engine.info(), task.phase)
        self._detokenizer = engine.detokenizer()
        self._stops = Stops(task.stop)
        self._tail = ""
        self._held: list[int] = []

    def find(self, tokens: Tokens) -> int | None:
        """How many of the tokens it takes to complete a stop string; None when they do not."""
        for index, token in enumerate(tokens):
            if self._step(token):
                return index + 1
        return None

    def _step(self, token: int) -> bool:
        self._held.append(token)
        for phase, count in self._phases.push((token,)):
            run, self._held = self._held[:count], self._held[count:]
            if phase == "answer":
                self._tail += self._detokenizer.push(run)
        found = self._stops.find(self._tail) is not None
        cut = max(0, len(self._tail) - self._stops.reach)
        self._tail = self._tail[cut:]
        self._stops.drop(cut)
        return found


class _Stopping(Through):
    __slots__ = ("_matcher", "_over")

    def __init__(self, inner: Stream, matcher: Matcher) -> None:
        super().__init__(inner)
        self._matcher = matcher
        self._over = False

    async def __anext__(self) -> Delta:
        if self._over:
            raise StopAsyncIteration
        delta = await self._inner.__anext__()
        size = self._matcher.find(delta.tokens)
        if size is None:
            return delta
        self._over = True
        return replace(parted(delta, size)[0], finish="stop")
