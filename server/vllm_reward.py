"""A process reward model in vLLM: what it says of every step of many paths, in one batch.

vLLM pools the logits of all tokens that it computes. Tokens found in the prefix cache are not computed and have none,
so a path whose first steps are known is read on from there, and a path of which everything is wanted is read in full.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial
from itertools import count
from math import nan
from typing import TYPE_CHECKING, Any, NoReturn

from vllm.pooling_params import PoolingParams

from thinkserve.server.reward_formats import Format, Reading
from thinkserve.server.vllm_served import Served
from thinkserve.server.vllm_stream import Submitted
from thinkserve.strategies.engine import Chain, Detokenizer, Job, ModelInfo, Path, Role, Score, Stream, Tokens
from thinkserve.strategies.errors import EngineDead, EngineFailed, TooLong, Unsupported
from thinkserve.strategies.together import together

if TYPE_CHECKING:
    from thinkserve.server.vllm_render import Renderer

UNWRITING = "A reward model rates steps; it does not write."


class RewardBackend(Served):
    """A reward model that is served. Everything here belongs to the event loop that it was started on."""

    def __init__(self, llm: Any, renderer: Renderer, tasks: Any, format: Format) -> None:
        super().__init__(llm, renderer)
        self.format = format
        self._tasks = tasks
        self._serial = count()

    def engine(self, request_id: str, salt: str | None = None) -> RewardEngine:
        """The Engine of one request; it can do nothing but `score`."""
        return RewardEngine(self, self.renderer, request_id, salt)

    def open(self, request_id: str, salt: str | None, tokens: Tokens, *, cached: bool) -> Pass:
        """A pass over `tokens`, not yet submitted; with `cached`, tokens in the prefix cache are not read again."""
        params = PoolingParams(task="token_classify", use_activation=False, skip_reading_prefix_cache=not cached)
        engine_id = f"{request_id}-{next(self._serial)}"
        return Pass(self._llm, self._tasks, engine_id, tokens=tokens, params=params, salt=salt)

    async def warm_up(self) -> None:
        """One pass, so that the first request does not pay for lazy set-up."""
        await self.engine("warm-up", "warm-up").score("1 + 1", [Path(("2\n\n",))])


class Pass(Submitted):
    """One sequence that the reward model reads."""

    __slots__ = ("_output", "_tokens")

    def __init__(
        self, llm: Any, tasks: Any, engine_id: str, *, tokens: Tokens, params: PoolingParams, salt: str | None
    ) -> None:
        super().__init__(llm, tasks, engine_id, params=params, salt=salt)
        self._tokens = tokens
        self._output: Any = None

    @property
    def prompt(self) -> Tokens:
        """The sequence."""
        return self._tokens

    def take(self, output: Any) -> None:
        """All logits at once."""
        self._output, self._ended = output, output.finished

    async def logits(self) -> tuple[int, Any]:
        """How many tokens were found in the cache, and the logits [tokens read, labels] of all others."""
        while not self._ended and self._error is None:
            await self.next_output()
        if self._error is not None:
            raise EngineDead("The reward model's engine is gone.") from self._error
        cached, data = int(self._output.num_cached_tokens), self._output.outputs.data
        if len(data) != len(self._tokens) - cached:
            raise EngineFailed("The engine gave up on the pass of the reward model.")
        return cached, data


class RewardEngine:
    """The Engine of one request on a reward model."""

    __slots__ = ("_backend", "_id", "_renderer", "_salt")

    def __init__(self, backend: RewardBackend, renderer: Renderer, request_id: str, salt: str | None) -> None:
        self._backend, self._renderer, self._id, self._salt = backend, renderer, request_id, salt

    def info(self, role: Role = "target") -> ModelInfo:
        """Facts about the reward model."""
        return self._renderer.info

    def encode(self, text: str, role: Role = "target") -> Tokens:
        """Token ids of plain text; no special tokens are added."""
        return self._renderer.encode(text)

    def decode(self, tokens: Sequence[int], role: Role = "target") -> str:
        """Text of the tokens, special tokens left out."""
        return self._renderer.decode(tokens)

    def detokenizer(self, role: Role = "target") -> Detokenizer:
        """A fresh incremental decoder."""
        return self._renderer.detokenizer()

    def generate(self, job: Job) -> AbstractAsyncContextManager[Stream]:
        """Raises Unsupported."""
        _refuse()

    def chain(self, job: Job) -> AbstractAsyncContextManager[Chain]:
        """Raises Unsupported."""
        _refuse()

    async def render(self, messages: Sequence[Mapping[str, str]], role: Role = "target") -> Tokens:
        """Raises Unsupported."""
        _refuse()

    async def score(self, question: str, paths: Sequence[Path], role: Role = "reward") -> list[Score]:
        """What the model says of each path. Steps beyond its context are NaN. Raises EngineFailed."""
        if not paths:
            return []
        try:
            prompt = await self._prompt(question)
        except TooLong:
            return [Score((nan,) * (len(path.steps) - path.known)) for path in paths]
        return await together(partial(self._score, prompt), paths)

    async def _prompt(self, question: str) -> Tokens:
        form = self._backend.format
        if form.plain is not None:
            return self._renderer.encode(form.plain(self._renderer.begin, question))
        return (await self._renderer.render(form.messages(question), None, {})).tokens

    async def _score(self, prompt: Tokens, path: Path) -> Score:
        form, wanted = self._backend.format, len(path.steps) - path.known
        reading = form.read(prompt, path, self._renderer.encode).within(self._renderer.info.context)
        rewards, read, cached = list[float](), 0, 0
        if len(reading.ends) > path.known:
            found, read, cached = await self._pass(reading, path.known)
            rewards = [form.probability(row) for row in found]
        return Score((*rewards, *[nan] * (wanted - len(rewards))), read, cached)

    async def _pass(self, reading: Reading, known: int) -> tuple[list[list[float]], int, int]:
        """Logits at the ends of the steps after the known ones, tokens read, and how many of them were cached."""
        tokens, ends, read = reading.tokens, reading.ends[known:], 0
        cached, data = await self._read(tokens, cached=known > 0)
        if cached > ends[0]:
            # Another path with this beginning has been read: the cache is ahead of what is known of this one.
            read = len(tokens) - cached
            cached, data = await self._read(tokens, cached=False)
        return [data[end - cached].tolist() for end in ends], read + len(tokens), cached

    async def _read(self, tokens: Tokens, *, cached: bool) -> tuple[int, Any]:
        async with self._backend.open(self._id, self._salt, tokens, cached=cached) as pending:
            return await pending.logits()


def _refuse() -> NoReturn:
    raise Unsupported(UNWRITING, "role")
