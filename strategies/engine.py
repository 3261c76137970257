"""The Engine protocol and its frozen types: all that a strategy may know of the machinery below it.

The protocol is owned by its consumer, the strategies. Adapters (vLLM in process, a remote server, the engine of
tests) implement it; every concern of all of them (metering, ceilings, deadlines, modifiers) is an Engine around it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Literal, Protocol

Tokens = tuple[int, ...]
Role = Literal["target", "guide", "reward", "verifier"]
Phase = Literal["thinking", "answer"]

# Why a stream ended. "stop": end of sequence or a stop token/string. "length": the job's max_tokens or the context.
# "ceiling"/"deadline": the request as a whole ran out of tokens or of time. "repetition": the engine saw a loop.
Finish = Literal["stop", "length", "ceiling", "deadline", "repetition"]


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a strategy may ask about a model: limits in tokens, ids of the tokens that mark thinking and its end."""

    name: str
    context: int
    vocab_size: int
    eos: Tokens
    think_open: Tokens = ()
    think_close: Tokens = ()

    @property
    def reasons(self) -> bool:
        """Whether the model marks its thinking at all."""
        return bool(self.think_close)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a token is drawn. Defaults are neutral; `top_k` 0 and `top_p` 1 mean "off"."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    @property
    def greedy(self) -> bool:
        """Whether every chain of one prompt would be the same."""
        return self.temperature == 0.0


@dataclass(frozen=True, slots=True)
class Control:
    """Base of the data that changes decoding inside the engine (steering, budget guidance); subclasses are frozen."""

    def later(self, written: int) -> Control:
        """The same control for a job that goes on where `written` tokens of this one have been written."""
        return self


@dataclass(frozen=True, slots=True)
class Job:
    """One sequence to generate.

    `max_tokens` counts new tokens. `thinking_budget` caps the thinking tokens of this job: the engine forces the end
    of thinking when it is reached (None: no cap). `stop` strings and `stop_tokens` end the job wherever they occur and
    stay in the tokens. `logprobs` is the number of alternatives per token (0: the sampled token's log-probability only;
    None: no log-probabilities at all). `stats` asks for a TokenStats per token.
    """

    prompt: Tokens
    max_tokens: int
    sampling: Sampling = Sampling()
    seed: int | None = None
    thinking_budget: int | None = None
    stop: tuple[str, ...] = ()
    stop_tokens: Tokens = ()
    role: Role = "target"
    controls: tuple[Control, ...] = ()
    logprobs: int | None = None
    stats: bool = False


@dataclass(frozen=True, slots=True)
class TokenStats:
    """What the raw logits z of one step say, before temperature, penalties and masks; all in nats.

    `certainty` = logsumexp(z) - mean(z) - ln V (self-certainty, arXiv:2502.18581), 0 for uniform logits; `entropy` of
    softmax(z); `margin` between the two largest logits; `close` = z[end of thinking] - max of all others, -inf for a
    model that does not mark its thinking.
    """

    certainty: float
    entropy: float
    margin: float
    close: float


@dataclass(frozen=True, slots=True)
class Delta:
    """What the engine produced since the last delta; `logprobs`, `top` and `stats` run parallel to `tokens` (nats).

    `top[i]` holds (token id, logprob) pairs, best first, when the job asked for alternatives. `finish` is set on the
    last delta of a stream and only there; that delta may hold no tokens.
    """

    tokens: Tokens = ()
    logprobs: tuple[float, ...] = ()
    top: tuple[tuple[tuple[int, float], ...], ...] = ()
    finish: Finish | None = None
    stats: tuple[TokenStats, ...] = ()


class Stream(Protocol):
    """An async iterator of deltas that knows what it cost.

    `generated` is the number of tokens the engine has sampled for this job, those never read included: final once the
    `generate` block has been left. `cached` is how many prompt tokens came from the prefix cache.
    """

    @property
    def generated(self) -> int:
        """Tokens sampled so far; final after the block."""

    @property
    def cached(self) -> int:
        """Prompt tokens found in the prefix cache."""

    def __aiter__(self) -> Stream: ...

    async def __anext__(self) -> Delta: ...


class Detokenizer(Protocol):
    """Incremental decoding: never a broken character; what is pending comes out with `flush`."""

    def push(self, tokens: Sequence[int]) -> str:
        """Text that is now certain."""

    def flush(self) -> str:
        """What was held back, at the end."""


class Chain(Protocol):
    """One sequence written step by step, with our own tokens between the segments."""

    @property
    def tokens(self) -> Tokens:
        """Everything after the prompt, generated and injected."""

    def segment(
        self, max_tokens: int, until: Tokens = (), controls: tuple[Control, ...] | None = None
    ) -> AbstractAsyncContextManager[Stream]:
        """Generate up to `max_tokens` or one of the `until` tokens (kept). Leaving the block ends the segment."""

    def inject(self, tokens: Tokens) -> None:
        """Append tokens of ours; they are prompt to the next segment and are not counted as generated."""

    def drop(self, count: int) -> None:
        """Between segments: forget the last `count` tokens. What was generated stays counted."""


@dataclass(frozen=True, slots=True)
class Path:
    """A partial solution: the text of its steps in order. Rewards of the first `known` steps are not wanted again."""

    steps: tuple[str, ...]
    known: int = 0


@dataclass(frozen=True, slots=True)
class Score:
    """What a reward model said of one path: for each step after the known ones the probability that it is right.

    `rewards` are in [0, 1], or NaN where the model failed; `tokens` is what the pass read, `cached` how many of them
    came from the prefix cache.
    """

    rewards: tuple[float, ...]
    tokens: int = 0
    cached: int = 0


class Engine(Protocol):
    """Everything a strategy can do."""

    def info(self, role: Role = "target") -> ModelInfo:
        """Facts about the model of a role. Raises Unsupported when the role is not configured."""

    def encode(self, text: str, role: Role = "target") -> Tokens:
        """Token ids of plain text; no special tokens are added."""

    def decode(self, tokens: Sequence[int], role: Role = "target") -> str:
        """Text of the tokens, special tokens left out."""

    def detokenizer(self, role: Role = "target") -> Detokenizer:
        """A fresh incremental decoder whose pieces, concatenated, equal `decode` of all tokens."""

    def generate(self, job: Job) -> AbstractAsyncContextManager[Stream]:
        """Run a job. Leaving the block, for any reason, ends the job in the engine."""

    def chain(self, job: Job) -> AbstractAsyncContextManager[Chain]:
        """Open a chain on the job's prompt; `job.max_tokens` bounds all segments together."""

    async def render(self, messages: Sequence[Mapping[str, str]], role: Role = "target") -> Tokens:
        """A chat as the role's model wants it, ready for its reply, thinking closed at once. Raises TooLong."""

    async def score(self, question: str, paths: Sequence[Path], role: Role = "reward") -> list[Score]:
        """What the reward model says of each path, all in one batch. Raises Unsupported, EngineFailed."""


@dataclass(frozen=True, slots=True)
class Task:
    """One request, as a strategy sees it.

    `max_tokens` and `thinking_budget` are per chain, `max_total_tokens` is for the whole request (enforced by the
    engine handed to the strategy). `phase` is where generation starts: inside the think block or already in the answer;
    None when the model decides by writing (or not) its opening tag. Without a `seed` the engine draws as it likes.
    `question` is what the user asked last, as text: for models that read it in a prompt of their own.
    """

    prompt: Tokens
    max_tokens: int
    sampling: Sampling = Sampling()
    thinking_budget: int | None = None
    max_total_tokens: int | None = None
    phase: Phase | None = "thinking"
    seed: int | None = 0
    logprobs: int | None = None
    question: str = ""

    def job(self, index: int = 0) -> Job:
        """The job of chain `index`: same prompt and sampling, its own seed if the task has one."""
        seed = None if self.seed is None else chain_seed(self.seed, index)
        return Job(self.prompt, self.max_tokens, self.sampling, seed, self.thinking_budget, logprobs=self.logprobs)


def chain_seed(seed: int, index: int) -> int:
    """Seed of chain `index`, in [0, 2**63): depends on nothing but the request's seed and the index."""
    digest = blake2b(f"{seed}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


EventType = Literal[
    "chain.started", "chain.progress", "chain.finished", "chain.aborted", "vote", "winner", "budget.forced",
    "node.created", "node.scored", "node.expanded", "node.pruned", "steer.applied", "takeover", "verifier", "error",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Event:
    """Progress, for those who watch; it may be dropped, and never changes the answer."""

    type: EventType
    chain: int | None = None
    data: Mapping[str, object] = field(default_factory=dict[str, object])


@dataclass(frozen=True, slots=True)
class Piece:
    """Committed output: tokens of the final completion, in order, never taken back.

    `phase` tells thinking from answer; tags that mark the border belong to neither text and carry `phase` "thinking".
    """

    phase: Phase
    tokens: Tokens
    logprobs: tuple[float, ...] = ()
    top: tuple[tuple[tuple[int, float], ...], ...] = ()


StoppedBy = Literal["all_done", "m_reached", "ceiling", "deadline", "length", "error"]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a strategy decided. `tokens` equals the concatenation of the pieces it emitted."""

    tokens: Tokens
    finish: Finish
    winner: int = 0
    stopped_by: StoppedBy = "all_done"
    reason: str = ""
    votes: Mapping[str, int] = field(default_factory=dict[str, int])
    warnings: tuple[str, ...] = ()


class Emit(Protocol):
    """The send side of the runner's bounded stream: awaiting it is back-pressure."""

    async def __call__(self, item: Piece | Event) -> None:
        """Hand on one item."""
