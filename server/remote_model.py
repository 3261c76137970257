"""A vLLM server elsewhere as the model of a role: its OpenAI-compatible routes as the strategies' Engine.

Every request has its own cheap Engine on the shared connections. A remote model writes and rates by what its server
offers: controls and statistics live inside an engine process and are refused. Only token ids are sent, and text is
tokenized here where the model's tokenizer is the target's.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from itertools import count

from thinkserve.server.remote_http import RemoteHttp
from thinkserve.server.remote_reward import RemoteReward
from thinkserve.server.remote_stream import RemoteStream
from thinkserve.server.remote_tokens import RemoteTokenizer
from thinkserve.server.remote_wire import chunk, completion, salted
from thinkserve.server.thinking import vllm_budget
from thinkserve.strategies.chain import ResubmittedChain
from thinkserve.strategies.engine import (
    Chain,
    Delta,
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
from thinkserve.strategies.errors import EngineDead, TooLong, Unsupported
from thinkserve.strategies.streams import Through


class RemoteModel:
    """One model on another server. `text` is an engine with the same tokenizer; `budgets`: it can end thinking."""

    def __init__(
        self,
        http: RemoteHttp,
        info: ModelInfo,
        role: Role,
        tokenizer: RemoteTokenizer,
        text: Engine | None = None,
        reward: RemoteReward | None = None,
    ) -> None:
        self.info = info
        self.tokenizer = tokenizer
        self.text = text
        self.reward = reward
        self.budgets = True
        self._http = http
        self._role = role
        self._serial = count()

    @property
    def alive(self) -> bool:
        """Whether a call would go out: not while the breaker holds them back."""
        return self._http.alive

    @property
    def kv_tokens(self) -> int:
        """0: the other server divides its cache itself."""
        return 0

    def engine(self, request_id: str, salt: str | None = None) -> RemoteEngine:
        """The Engine of one request."""
        return RemoteEngine(self, request_id, salt)

    def open(self, job: Job, request_id: str, salt: str | None = None) -> AbstractAsyncContextManager[Stream]:
        """A stream of `job`, not yet sent. Raises Unsupported, TooLong."""
        if self.reward is not None:
            raise self.lacks("rates steps, it does not write")
        if job.controls or job.stats:
            raise self.lacks("takes no controls and gives no statistics: it runs in another process")
        if len(job.prompt) >= self.info.context:
            raise TooLong(len(job.prompt), self.info.context)
        budget = vllm_budget(job, self.info)
        if budget is not None and not self.budgets:
            raise self.lacks("cannot end thinking at a budget: start its server with a reasoning parser")
        body = completion(job, self.info, budget)
        names = {"model": self.info.name, "request_id": f"{request_id}-{self._role}-{next(self._serial)}"}
        parse = partial(chunk, job=job, vocab_size=self.info.vocab_size)
        stream = RemoteStream(self._http, body | names | salted(salt), job.max_tokens, parse)
        asks = self.text is None and job.max_tokens == 1 and bool(job.logprobs)
        return self._named(stream) if asks else stream

    @asynccontextmanager
    async def _named(self, stream: RemoteStream) -> AsyncIterator[Stream]:
        async with stream:
            yield _Named(stream, self.tokenizer)

    def lacks(self, what: str) -> Unsupported:
        """The error for something that this model does not do."""
        return Unsupported(f"{self._http.who} {what}.", "strategy")

    async def check(self) -> None:
        """Raise EngineDead unless a call would go out. Nothing is sent: calls themselves tell how the server is."""
        if not self.alive:
            raise EngineDead(str(self._http.shunned()))

    async def aclose(self) -> None:
        """Close all connections; streams that are still open fail."""
        await self._http.aclose()


class _Named(Through):
    """The stream of a question with one token for an answer: the texts of its alternatives can be decoded."""

    __slots__ = ("_tokenizer",)

    def __init__(self, inner: Stream, tokenizer: RemoteTokenizer) -> None:
        super().__init__(inner)
        self._tokenizer = tokenizer

    async def __anext__(self) -> Delta:
        delta = await super().__anext__()
        await self._tokenizer.name(token for alternatives in delta.top for token, _ in alternatives)
        return delta

    def unread(self) -> Delta:
        """Nothing: an answer whose alternatives have no texts is none."""
        return Delta()


class RemoteEngine:
    """The Engine of one request on a remote model. Roles were told apart before: here is one model."""

    __slots__ = ("_id", "_model", "_salt")

    def __init__(self, model: RemoteModel, request_id: str, salt: str | None) -> None:
        self._model = model
        self._id = request_id
        self._salt = salt

    def info(self, role: Role = "target") -> ModelInfo:
        """Facts about the model; `vocab_size` 0 and no `eos` where its tokenizer is not the target's."""
        return self._model.info

    def encode(self, text: str, role: Role = "target") -> Tokens:
        """Token ids of plain text. Raises Unsupported for a tokenizer of its own."""
        return self._text.encode(text)

    def decode(self, tokens: Sequence[int], role: Role = "target") -> str:
        """Text of the tokens, special tokens left out.

        With a tokenizer of its own: of one token that was an alternative in a job of one token. Raises Unsupported.
        """
        word = self._model.tokenizer.word(tokens[0]) if len(tokens) == 1 else None
        return self._text.decode(tokens) if word is None else word

    def detokenizer(self, role: Role = "target") -> Detokenizer:
        """A fresh incremental decoder. Raises Unsupported for a tokenizer of its own."""
        return self._text.detokenizer()

    def generate(self, job: Job) -> AbstractAsyncContextManager[Stream]:
        """Run a job; leaving the block closes its connection, upon which the server aborts it."""
        return self._model.open(job, self._id, self._salt)

    @asynccontextmanager
    async def chain(self, job: Job) -> AsyncIterator[Chain]:
        """Open a chain on the job's prompt, by resubmission: the server's prefix cache keeps what was computed."""
        yield ResubmittedChain(self.generate, job, self._model.info)

    async def render(self, messages: Sequence[Mapping[str, str]], role: Role = "target") -> Tokens:
        """A chat by the model's own template, thinking closed at once. Raises TooLong, Refused, EngineFailed."""
        return await self._model.tokenizer.closed_chat(messages, self._model.info)

    async def score(self, question: str, paths: Sequence[Path], role: Role = "reward") -> list[Score]:
        """What the reward model says of each path, in one request. Raises Unsupported, Refused, EngineFailed."""
        if self._model.reward is None:
            raise self._model.lacks("writes, it does not rate steps")
        return await self._model.reward.score(question, paths, self._salt)

    @property
    def _text(self) -> Engine:
        if self._model.text is None:
            raise self._model.lacks("has a tokenizer of its own, which only its server knows")
        return self._model.text
