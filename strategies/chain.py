"""A Chain over any engine that can only generate: every segment is a new job on the prompt and all tokens so far.

The prefix cache makes it cheap. Adapters that can keep a sequence open do better and fall back to this.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace

from thinkserve.strategies.engine import Control, Job, ModelInfo, Stream, Tokens, chain_seed
from thinkserve.strategies.streams import Ended, Recorded
from thinkserve.strategies.text import rfind

Generate = Callable[[Job], AbstractAsyncContextManager[Stream]]


class ResubmittedChain:
    """Implements Chain on `generate`; the job's `max_tokens` and `thinking_budget` bound all segments together."""

    def __init__(self, generate: Generate, job: Job, info: ModelInfo) -> None:
        self._generate = generate
        self._job = job
        self._close = info.think_close
        self._tokens: list[int] = []
        self._generated = 0
        self._segments = 0

    @property
    def tokens(self) -> Tokens:
        """Everything after the prompt that was read or injected; what the engine wrote unread is not part of it."""
        return tuple(self._tokens)

    def inject(self, tokens: Tokens) -> None:
        """Append tokens of ours; they are prompt to the next segment."""
        self._tokens.extend(tokens)

    def drop(self, count: int) -> None:
        """Forget the last tokens; they are no prompt to the next segment."""
        del self._tokens[len(self._tokens) - count :]

    @asynccontextmanager
    async def segment(
        self, max_tokens: int, until: Tokens = (), controls: tuple[Control, ...] | None = None
    ) -> AsyncIterator[Stream]:
        """Generate up to `max_tokens`, one of `until`, or what is left of the job's budget (none left: "length")."""
        allowed = min(max_tokens, self._job.max_tokens - self._generated)
        if allowed <= 0:
            yield Ended("length")
            return
        stream: Stream | None = None
        try:
            async with self._generate(self._next(allowed, until, controls)) as stream:
                yield Recorded(stream, self._tokens)
        finally:
            # The count is final only here, after the block.
            self._generated += 0 if stream is None else stream.generated

    def _next(self, allowed: int, until: Tokens, controls: tuple[Control, ...] | None) -> Job:
        seed = self._job.seed
        if seed is not None and self._segments:
            # The same seed would draw the same random numbers again.
            seed = chain_seed(seed, self._segments)
        self._segments += 1
        return replace(
            self._job,
            prompt=self._job.prompt + self.tokens,
            max_tokens=allowed,
            seed=seed,
            thinking_budget=self._thinking_left(),
            stop_tokens=self._job.stop_tokens + until,
            controls=self._controls() if controls is None else controls,
        )

    def _controls(self) -> tuple[Control, ...]:
        return tuple(control.later(len(self._tokens)) for control in self._job.controls)

    def _thinking_left(self) -> int | None:
        budget = self._job.thinking_budget
        if budget is None or not self._close:
            return budget
        return None if rfind(self.tokens, self._close) >= 0 else max(0, budget - len(self._tokens))
