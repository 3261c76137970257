"""An Engine around an Engine: everything is handed on, and every stream passes through one method.

The segments of a chain are streams like any other, so a subclass that overrides `watch` sees all that is generated.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace

from thinkserve.strategies.engine import (
    Chain,
    Control,
    Detokenizer,
    Engine,
    Job,
    ModelInfo,
    Path,
    Role,
    Score,
    Stream,
    Tokens,
)

Open = Callable[[Job], AbstractAsyncContextManager[Stream]]


class Around:
    """Base of the wrappers; by itself it changes nothing."""

    def __init__(self, inner: Engine) -> None:
        self._inner = inner

    def watch(self, open: Open, job: Job) -> AbstractAsyncContextManager[Stream]:
        """The stream of `job`, which `open` starts; of a segment, `job` is what the segment amounts to."""
        return open(job)

    def info(self, role: Role = "target") -> ModelInfo:
        """Facts about the model of a role."""
        return self._inner.info(role)

    def encode(self, text: str, role: Role = "target") -> Tokens:
        """Token ids of plain text."""
        return self._inner.encode(text, role)

    def decode(self, tokens: Sequence[int], role: Role = "target") -> str:
        """Text of the tokens."""
        return self._inner.decode(tokens, role)

    def detokenizer(self, role: Role = "target") -> Detokenizer:
        """A fresh incremental decoder."""
        return self._inner.detokenizer(role)

    def generate(self, job: Job) -> AbstractAsyncContextManager[Stream]:
        """Run a job under watch."""
        return self.watch(self._inner.generate, job)

    @asynccontextmanager
    async def chain(self, job: Job) -> AsyncIterator[Chain]:
        """Open a chain whose segments are under watch."""
        async with self._inner.chain(job) as chain:
            yield _Chain(chain, job, self)

    async def render(self, messages: Sequence[Mapping[str, str]], role: Role = "target") -> Tokens:
        """A chat as the role's model wants it."""
        return await self._inner.render(messages, role)

    async def score(self, question: str, paths: Sequence[Path], role: Role = "reward") -> list[Score]:
        """What the reward model says of each path."""
        return await self._inner.score(question, paths, role)


class AroundChain:
    """Base of the wrapped chains: hands everything on; subclasses say what a segment is."""

    def __init__(self, inner: Chain) -> None:
        self._inner = inner

    @property
    def tokens(self) -> Tokens:
        """Everything after the prompt, generated and injected."""
        return self._inner.tokens

    def inject(self, tokens: Tokens) -> None:
        """Append tokens of ours."""
        self._inner.inject(tokens)

    def drop(self, count: int) -> None:
        """Forget the last tokens."""
        self._inner.drop(count)


class _Chain(AroundChain):
    def __init__(self, inner: Chain, job: Job, around: Around) -> None:
        super().__init__(inner)
        self._job, self._around = job, around

    def segment(
        self, max_tokens: int, until: Tokens = (), controls: tuple[Control, ...] | None = None
    ) -> AbstractAsyncContextManager[Stream]:
        job = replace(self._job, prompt=self._job.prompt + self._inner.tokens, max_tokens=max_tokens)
        return self._around.watch(lambda each: self._inner.segment(each.max_tokens, until, controls), job)
