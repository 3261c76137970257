"""The few types that cross the server's inner borders: what was decided at the edge, what it cost, what came out.

`Plan` goes from the wire (protocol, choice, translate) to the runner; `Outcome` comes back. `Backend` is what the
server needs of its models beyond the Engine protocol. No algorithms, no wire format.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from thinkserve.server.vectors import VectorRegistry
from thinkserve.strategies.engine import (
    Answer,
    Control,
    Engine,
    Event,
    ModelInfo,
    Phase,
    Role,
    Sampling,
    Task,
    Tokens,
)
from thinkserve.strategies.modifiers import Layer
from thinkserve.strategies.registry import Options, Strategy, StreamMode

MOST_LOGGED = 128


@dataclass(frozen=True, slots=True)
class Rendered:
    """A chat turned into tokens, and where generation starts (None: the model decides)."""

    tokens: Tokens
    phase: Phase | None


class ServedModel(Protocol):
    """A model that serves some role: in a process of this server's or on another server.

    Its engines are asked as the target's are, whichever role it serves here (`server/roles.py` knows); a reward model's
    can do nothing but `score`, and all others cannot.
    """

    @property
    def info(self) -> ModelInfo:
        """Facts about the model."""
        ...

    @property
    def kv_tokens(self) -> int:
        """How many tokens the key-value cache can hold; 0 when that is another server's concern."""
        ...

    @property
    def alive(self) -> bool:
        """Whether the engine is there; cheap."""
        ...

    def engine(self, request_id: str, salt: str | None = None) -> Engine:
        """The Engine of one request: engine ids start with `request_id`, prefixes are shared within `salt` only."""
        ...

    async def check(self) -> None:
        """Raise EngineDead when the engine cannot serve any more."""
        ...

    async def aclose(self) -> None:
        """Stop the engine and its processes."""
        ...


class Backend(ServedModel, Protocol):
    """All models of a server behind its target: an engine per request that serves every role, the chat template."""

    @property
    def roles(self) -> Mapping[Role, ServedModel]:
        """The model that serves each role there is."""
        ...

    @property
    def defaults(self) -> Sampling:
        """How tokens are drawn where a request says nothing: the model's generation_config."""
        ...

    @property
    def vectors(self) -> VectorRegistry | None:
        """Steering vectors by name; None when the engine cannot steer."""
        ...

    @property
    def guides(self) -> bool:
        """Whether the target has a budget predictor, so that jobs may carry a Guide."""
        ...

    async def render(
        self, messages: Sequence[Mapping[str, Any]], *, thinking: bool | None = None, kwargs: Mapping[str, Any] = {}
    ) -> Rendered:
        """Apply the model's chat template off the event loop. Raises TooLong, BadOptions."""
        ...


@dataclass(frozen=True, slots=True)
class Plan:
    """One admitted request. `timeout_s` bounds the whole of it.

    `controls` go on every job of the target model, beside those that the strategy sets itself; `over` are the modifiers
    that lie below it. `asked`: the request names its strategy, in whatever place.
    """

    request_id: str
    model: str
    task: Task
    strategy: Strategy
    options: Options
    timeout_s: float | None = None
    stream_mode: StreamMode = "winner"
    preset: str | None = None
    salt: str | None = None
    warnings: tuple[str, ...] = ()
    include_reasoning: bool = True
    usage_scope: Literal["all", "winner"] = "all"
    controls: tuple[Control, ...] = ()
    over: tuple[Layer, ...] = ()
    asked: bool = False

    @property
    def roles(self) -> frozenset[Role]:
        """The models without which the strategy cannot work with these options."""
        return frozenset((*self.strategy.roles, *self.options.roles().values()))

    @property
    def cost(self) -> int:
        """KV tokens that the request may hold at once: chains x (prompt + tokens per chain)."""
        return self.options.chains() * (len(self.task.prompt) + self.task.max_tokens)


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens as the engines counted them; the prompt once, every generated token of every model, lost ones included.

    Chains are the target's. `draft_tokens` and `verifier_tokens` are those of `completion_tokens` that guide and
    verifier generated; `prm_tokens` is what the reward model read, cached tokens left out, in `prm_passes` passes.
    `winner_tokens` are those of the completion that some model generated, `injected_tokens` the others: our own words.
    `cache_hit_ratio` is the part of all jobs' prompts that was in the cache; None when there was one job only.
    """

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    winner_tokens: int
    answer_tokens: int
    chains_started: int
    chains_finished: int
    chains_aborted: int
    wall_ms: float
    ttft_ms: float | None
    draft_tokens: int = 0
    prm_tokens: int = 0
    prm_passes: int = 0
    verifier_calls: int = 0
    verifier_tokens: int = 0
    injected_tokens: int = 0
    cache_hit_ratio: float | None = None

    @property
    def wasted_tokens(self) -> int:
        """Generated tokens that are not in the returned completion."""
        return self.completion_tokens - self.winner_tokens


@dataclass(slots=True)
class Log:
    """Events of one request that a summary tells of: the first `MOST_LOGGED`, and how many came after them."""

    events: list[Event] = field(default_factory=list[Event])
    omitted: int = 0

    def note(self, event: Event) -> None:
        """Keep one more, if there is room."""
        if len(self.events) < MOST_LOGGED:
            self.events.append(event)
        else:
            self.omitted += 1


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the runner hands back once the strategy has decided."""

    answer: Answer
    usage: Usage
    log: Log = field(default_factory=Log)
