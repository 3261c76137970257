"""Shapes of the responses, as typed dictionaries: checked by the type checker where they are built, and the source of
the response schemas in openapi.yaml.
"""

from __future__ import annotations

from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

from thinkserve.server.modifier_types import ModifierCard, OverReport
from thinkserve.server.trace_types import TraceReport
from thinkserve.strategies.engine import StoppedBy

FinishReason = Literal["stop", "length"]


class TopLogprob(TypedDict):
    """An alternative for one token."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """One token of the answer, with the alternatives that were asked for."""

    top_logprobs: list[TopLogprob]


class Logprobs(TypedDict):
    """Log-probabilities of the visible answer; the thoughts have none here."""

    content: list[TokenLogprob]
    refusal: None


class Decision(TypedDict):
    """What was chosen, and why."""

    winner: int
    reason: str
    votes: dict[str, int]


class SteerReport(TypedDict):
    """A steering vector that was added to every chain; no layers: all that the vector has."""

    vector: str
    scale: float
    layers: list[int]
    positions: Literal["generated", "thinking"]


class StrategyReport(TypedDict):
    """The strategy at work: effective parameters, decision, warnings."""

    name: str
    version: str
    preset: str | None
    params: dict[str, Any]
    decision: Decision
    stopped_by: StoppedBy
    warnings: list[str]
    trace_id: str
    steer: NotRequired[list[SteerReport]]
    over: NotRequired[list[OverReport]]
    trace: NotRequired[TraceReport]


class Chains(TypedDict):
    """How many chains were started, and how they ended."""

    started: int
    finished: int
    aborted: int


class StrategyUsage(TypedDict):
    """Where the tokens went; repeats what clients need that keep nothing but `usage`.

    Tokens that the guide (draft) and the verifier generated are part of the completion; those that the reward model
    (prm) read are not, nor are injected ones: words of ours in the completion. What was not done is left out, and so is
    the cache's share when one job ran.
    """

    name: str
    winner: int | None
    stopped_by: StoppedBy | None
    trace_id: str
    winner_completion_tokens: int
    wasted_tokens: int
    chains: Chains
    wall_ms: float
    ttft_ms: float | None
    injected_tokens: NotRequired[int]
    draft_tokens: NotRequired[int]
    prm_tokens: NotRequired[int]
    prm_passes: NotRequired[int]
    verifier_calls: NotRequired[int]
    verifier_tokens: NotRequired[int]
    cache_hit_ratio: NotRequired[float]


class PromptDetails(TypedDict):
    """Of the prompt's tokens."""

    cached_tokens: int


class CompletionDetails(TypedDict):
    """Of the generated tokens: all that are not the visible answer."""

    reasoning_tokens: int


class UsageReport(TypedDict):
    """Tokens as the engine counted them, those of losing and aborted chains included."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails
    strategy: StrategyUsage


class AssistantMessage(TypedDict):
    """The answer; `reasoning` and `reasoning_content` are the same thoughts under both customary names."""

    role: Literal["assistant"]
    content: str
    refusal: None
    reasoning: str | None
    reasoning_content: str | None


class CompletionChoice(TypedDict):
    """The one choice of a completion."""

    index: int
    message: AssistantMessage
    logprobs: Logprobs | None
    finish_reason: FinishReason


class Completion(TypedDict):
    """Body of a plain response."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: UsageReport
    strategy: NotRequired[StrategyReport]


class ChunkDelta(TypedDict, total=False):
    """What a chunk adds to the message."""

    role: Literal["assistant"]
    content: str
    reasoning: str
    reasoning_content: str


class ChunkChoice(TypedDict):
    """The one choice of a chunk."""

    index: int
    delta: ChunkDelta
    logprobs: Logprobs | None
    finish_reason: FinishReason | None


class StrategyEvent(TypedDict):
    """Progress of the chains, for those who asked to see it."""

    seq: int
    t_ms: float
    type: str
    chain: int | None
    data: dict[str, Any]


class Chunk(TypedDict):
    """One `data:` line of a stream."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: NotRequired[UsageReport | None]
    strategy: NotRequired[StrategyReport]
    strategy_event: NotRequired[StrategyEvent]


class ReasoningCard(TypedDict):
    """How much a model may think: efforts by name with their budgets in tokens."""

    efforts: list[str]
    budgets: dict[str, int]
    default_effort: str | None
    max_budget: int


class ModelCard(TypedDict):
    """A served model, or a preset of it."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    description: str
    max_model_len: int
    reasoning: ReasoningCard | None
    strategies: list[str]
    supported_parameters: list[str]


class ModelList(TypedDict):
    """All model cards."""

    object: Literal["list"]
    data: list[ModelCard]


class SupportsCard(TypedDict):
    """What a request may combine with a strategy; `over` names the modifiers that may lie below it."""

    stream: list[str]
    n: bool
    tools: bool
    response_format: bool
    logprobs: bool
    seed: bool
    steer: bool
    over: list[str]


class StrategyCard(TypedDict):
    """A strategy: its parameters as JSON Schema, its defaults and limits, and whether this server can run it."""

    id: str
    object: Literal["strategy"]
    title: str
    aliases: list[str]
    version: str
    summary: str
    params_schema: dict[str, Any]
    defaults: dict[str, Any]
    limits: dict[str, float]
    requires: list[str]
    available: bool
    unavailable_reason: str | None
    supports: SupportsCard
    presets: list[str]
    reference: str | None


class StrategyList(TypedDict):
    """All strategies, and the modifiers that may lie below some of them."""

    object: Literal["list"]
    data: list[StrategyCard]
    modifiers: list[ModifierCard]


class ErrorDetail(TypedDict):
    """What went wrong; `param` is a dotted path into the request."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(TypedDict):
    """Body of every error."""

    error: ErrorDetail


class Version(TypedDict):
    """The server's version."""

    version: str
