"""The request of `POST /v1/chat/completions`: what is understood, what is refused by name, what is passed over.

Every field is in one of three classes. Modelled fields are honoured. `REFUSED` fields would change the answer and are
not supported: anything but their neutral value is 400. All others are ignored; those nobody has heard of are named in
the response header `X-Ignored-Params`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from thinkserve.server.errors import ApiError, clean
from thinkserve.server.messages import Message, Text, Wire, complaint, kind, parts_in
from thinkserve.server.settings import Effort
from thinkserve.server.validation import from_pydantic
from thinkserve.strategies.controls import Positions
from thinkserve.strategies.registry import StreamMode

MAX_MESSAGES = 4096
MAX_BIASES = 1024
MAX_STOP_CHARS = 256
MAX_STEERS = 4
MAX_OVER = 4
MAX_SCALE = 10.0
# On lists: a body holds up to a million items, and complaints about all of them would hold up every other request.
FIRST_ONLY: Any = Field(fail_fast=True)

# Field -> values that ask for nothing; null always is one.
REFUSED: dict[str, tuple[object, ...]] = {
    "n": (1,), "best_of": (1,), "tools": (), "tool_choice": ("none", "auto"), "functions": (),
    "function_call": ("none", "auto"), "response_format": ({"type": "text"},), "modalities": (["text"],), "audio": (),
    "prediction": (), "web_search_options": (), "prompt_embeds": (), "chat_template": (), "documents": (),
    "media_io_kwargs": ({},), "mm_processor_kwargs": ({},), "structured_outputs": (), "guided_json": (),
    "guided_regex": (), "guided_choice": (), "guided_grammar": (), "guided_decoding_backend": (),
    "guided_whitespace_pattern": (), "vllm_xargs": ({},), "cache_salt": (), "kv_transfer_params": ({},),
    "ec_transfer_params": ({},), "echo": (False,), "add_generation_prompt": (True,), "continue_final_message": (False,),
    "add_special_tokens": (False,), "use_beam_search": (False,), "length_penalty": (1, 1.0), "min_tokens": (0,),
    "stop_token_ids": ([],), "include_stop_str_in_output": (False,), "ignore_eos": (False,),
    "skip_special_tokens": (True,), "spaces_between_special_tokens": (True,), "truncate_prompt_tokens": (),
    "prompt_logprobs": (), "logprob_token_ids": ([],), "allowed_token_ids": ([],), "bad_words": ([],),
    "return_tokens_as_token_ids": (False,), "return_token_ids": (False,), "priority": (0,), "repetition_detection": (),
    "logits_processors": (), "custom_logit_processor": (), "custom_params": (), "steering": (),
    "separate_reasoning": (True,),
}  # fmt: skip

# Fields that clients send routinely and that change nothing about the answer.
HARMLESS = frozenset({
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "parallel_tool_calls", "request_id", "session_id", "rid",
})  # fmt: skip

OPEN = ("reasoning", "thinking", "stream_options")  # objects whose unknown names are reported, not refused


class StreamOptions(Wire):
    """What a stream carries beside the text."""

    include_usage: bool | None = None
    include_progress: bool | None = Field(None, description="Send `strategy_event` chunks as chains come and go.")


class Reasoning(Wire):
    """OpenRouter's and the Responses API's `reasoning` object."""

    effort: Effort | None = None
    max_tokens: int | None = Field(None, ge=-1)
    mode: str | None = Field(None, description="Name of a strategy or preset.")
    enabled: bool | None = None
    exclude: bool | None = None


class Thinking(Wire):
    """DeepSeek's and Anthropic's `thinking` object."""

    type: Literal["enabled", "disabled", "adaptive"] | None = None
    budget_tokens: int | None = Field(None, ge=-1)


class TemplateKwargs(Wire):
    """The two switches of chat templates that a request may set."""

    enable_thinking: bool | None = None
    thinking: bool | None = None

    @model_validator(mode="after")
    def _nothing_else(self) -> TemplateKwargs:
        for name in self.model_extra or {}:
            raise complaint("unsupported_parameter", "only enable_thinking and thinking may be set", clean(name))
        return self


class SteerChoice(Wire):
    """One steering vector on every chain of the target model, whatever the strategy."""

    model_config = ConfigDict(extra="forbid")

    vector: str = Field(description="Name of a vector of this server.")
    scale: float = Field(
        1.0,
        description="Factor of the raw vector; negative: away from it.",
        json_schema_extra={"minimum": -MAX_SCALE, "maximum": MAX_SCALE},
    )
    layers: Annotated[list[int], FIRST_ONLY] | None = Field(
        None, description="Blocks whose output is steered, counted from 0; default: all that the vector has."
    )
    positions: Positions = Field("generated", description="All generated tokens, or those until the end of thinking.")

    @field_validator("scale", mode="after")
    @classmethod
    def _bounded(cls, scale: float) -> float:
        if abs(scale) > MAX_SCALE:
            raise PydanticCustomError("invalid_steering", f"a scale lies between -{MAX_SCALE:g} and {MAX_SCALE:g}")
        return scale


class OverChoice(Wire):
    """One modifier below the strategy: it changes every chain, whatever the strategy."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(description="Name of a modifier of this server.")
    params: dict[str, Any] = Field(default_factory=dict[str, Any], description="Checked against the modifier's schema.")


class StrategyChoice(Wire):
    """`strategy` as an object; a misspelt name is an error."""

    model_config = ConfigDict(extra="forbid")

    name: str
    params: dict[str, Any] = Field(default_factory=dict[str, Any], description="Checked against the strategy's schema.")
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    timeout_s: float | None = Field(None, gt=0, description="Deadline of the whole request in seconds.")
    max_total_tokens: int | None = Field(
        None,
        ge=1,
        description="Most tokens of all chains together; those of the step that reaches it may be more.",
    )
    stream: StreamMode | None = Field(None, description="Whose reasoning is streamed.")
    trace: Literal["none", "summary", "full"] | None = Field(
        None, description="summary: take-overs, verdicts, endings and votes, in the report."
    )
    steer: list[SteerChoice] = Field(
        default_factory=list[SteerChoice], max_length=MAX_STEERS, description="Steering vectors, added in this order."
    )
    over: list[OverChoice] = Field(
        default_factory=list[OverChoice], max_length=MAX_OVER, description="Modifiers of its chains, from the top down."
    )


class ChatRequest(Wire):
    """The body. Token limits and budgets are per chain."""

    model: str = Field(min_length=1, description="The served model, or `model:preset`.")
    messages: list[Message] = Field(max_length=MAX_MESSAGES, description="The conversation; text only.")
    strategy: Annotated[Text | Annotated[StrategyChoice, Tag("object")], Discriminator(kind)] | None = None
    reasoning: Reasoning | None = None
    reasoning_effort: Effort | None = Field(
        None, description="Share of the context for thinking; see the model's card."
    )
    thinking: Thinking | None = None
    thinking_token_budget: int | None = Field(None, ge=-1, description="Thinking tokens per chain; -1: no limit.")
    thinking_budget: int | None = Field(None, ge=-1, description="Same as thinking_token_budget.")
    enable_thinking: bool | None = Field(None, description="Whether the model thinks before it answers.")
    include_reasoning: bool | None = Field(None, description="Whether the thoughts are in the response.")
    chat_template_kwargs: TemplateKwargs | None = None
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**63, description="Tokens per chain, thoughts included.")
    max_tokens: int | None = Field(None, ge=1, lt=2**63, description="Same as max_completion_tokens.")
    temperature: float | None = Field(None, ge=0, le=2, description="Default of this and of all below: the model's.")
    top_p: float | None = Field(None, gt=0, le=1, description="Least probability mass to draw from.")
    top_k: int | None = Field(None, ge=-1, lt=2**31, description="Most tokens to draw from; 0 or -1: all.")
    min_p: float | None = Field(None, ge=0, le=1, description="Least probability relative to the likeliest token's.")
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        None, max_length=MAX_BIASES, description="Added to the logits, by token id; one chain only."
    )
    seed: int | None = Field(None, ge=-(2**63), lt=2**63, description="Every chain's seed follows from it.")
    stop: Annotated[Text | Annotated[list[str], FIRST_ONLY, Tag("list")], Discriminator(kind)] | None = Field(
        None, description="Up to 4 strings that end the answer; thoughts may hold them."
    )
    logprobs: bool | None = Field(None, description="Log-probabilities of the visible answer's tokens.")
    top_logprobs: int | None = Field(None, ge=0, le=20, description="Alternatives per token.")
    n: int | None = Field(None, ge=1, le=128, description="1; strategies return one choice.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @field_validator("messages", mode="before")
    @classmethod
    def _some_but_not_too_many(cls, value: object) -> object:
        # Before the items are looked at, so that a body full of tiny parts is refused at once.
        if isinstance(value, list):
            if not value:
                raise PydanticCustomError("missing_field", "there must be at least one message")
            if len(value) > MAX_MESSAGES or sum(map(parts_in, value)) > MAX_MESSAGES:
                raise PydanticCustomError(
                    "value_out_of_range", f"at most {MAX_MESSAGES} messages and parts are allowed"
                )
        return value

    @field_validator("stop", mode="after")
    @classmethod
    def _stops(cls, value: str | list[str] | None) -> str | list[str] | None:
        stops = [value] if isinstance(value, str) else value or []
        if len(stops) > 4:
            raise PydanticCustomError("value_out_of_range", "at most 4 stop strings are allowed")
        if not all(0 < len(stop) <= MAX_STOP_CHARS for stop in stops):
            raise PydanticCustomError("value_out_of_range", f"a stop string has 1 to {MAX_STOP_CHARS} characters")
        return value

    @model_validator(mode="after")
    def _together(self) -> ChatRequest:
        if self.stream_options is not None and not self.stream:
            raise complaint("value_out_of_range", "stream_options needs stream to be true", "stream_options")
        if self.top_logprobs and not self.logprobs:
            raise complaint("value_out_of_range", "top_logprobs needs logprobs to be true", "top_logprobs")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def choice(self) -> StrategyChoice | None:
        """The strategy of the body as an object, however it was written."""
        if isinstance(self.strategy, str):
            return StrategyChoice.model_validate({"name": self.strategy})
        return self.strategy

    @property
    def ignored(self) -> tuple[str, ...]:
        """Dotted names of fields that were not understood."""
        top = [name for name in self.model_extra or {} if name not in HARMLESS and name not in REFUSED]
        nested = [
            f"{name}.{extra}" for name in OPEN for extra in getattr(getattr(self, name), "model_extra", None) or ()
        ]
        return tuple(clean(name) for name in top + nested)


def parse_chat(body: dict[str, Any]) -> ChatRequest:
    """The request in `body`. Raises ApiError 400 with the path of the field at fault."""
    try:
        chat = ChatRequest.model_validate(body)
    except ValidationError as error:
        steers = {f"strategy.steer.{index}": SteerChoice.model_fields for index in range(MAX_STEERS)}
        layers = {f"strategy.over.{index}": OverChoice.model_fields for index in range(MAX_OVER)}
        raise from_pydantic(error, body, known={"strategy": StrategyChoice.model_fields, **steers, **layers}) from None
    for name, neutral in REFUSED.items():
        value = body.get(name)
        if value is not None and not any(type(value) is type(one) and value == one for one in neutral):
            raise ApiError(400, "unsupported_parameter", f"{name} is not supported with this value.", param=name)
    return chat
