"""From a validated request to a Plan: names resolved, limits applied, the chat rendered to tokens.

What cannot be honoured is refused here, before anything runs; what is merely cut to fit becomes a warning.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from starlette.datastructures import Headers

from thinkserve.server.budget import Thinking, thinking
from thinkserve.server.choice import HEADER, Choice, choose
from thinkserve.server.errors import ApiError, clean
from thinkserve.server.needs import check_available, check_budget
from thinkserve.server.plan import Backend, Plan, Rendered
from thinkserve.server.protocol import MAX_STEERS, ChatRequest
from thinkserve.server.settings import Settings
from thinkserve.server.steered import check_steer, foreign, invalid, to_steers
from thinkserve.strategies.controls import Steer
from thinkserve.strategies.engine import ModelInfo, Sampling, Task
from thinkserve.strategies.errors import BadOptions, TooLong
from thinkserve.strategies.registry import Strategy, StreamMode

TIMEOUT_HEADER = "X-Request-Timeout-Ms"
LONGEST_TIMEOUT_S = 3600.0
UNWATCHED = 16  # tokens per delta that nobody reads along
COLDEST = 0.01  # as vLLM: a positive temperature below this is numerically unsafe


class Serving(Protocol):
    """What of the server's state a translation needs."""

    @property
    def settings(self) -> Settings:
        """The effective configuration."""
        ...

    @property
    def backend(self) -> Backend:
        """The served model."""
        ...


@dataclass(slots=True)
class Warnings:
    """What was changed to make a request fit, in the words of the response."""

    texts: list[str] = field(default_factory=list[str])

    def add(self, text: str) -> None:
        """Note one change."""
        self.texts.append(text)


def served_name(serving: Serving) -> str:
    """The name by which clients know the model."""
    return serving.settings.served_name or serving.backend.info.name.rstrip("/").rpartition("/")[2]


async def to_plan(chat: ChatRequest, headers: Headers, serving: Serving, request_id: str, salt: str | None) -> Plan:
    """The Plan of a request. Raises ApiError 400 or 404, TooLong, EngineDead."""
    settings, info = serving.settings, serving.backend.info
    choice = choose(chat, headers.getlist(HEADER), settings, served_name(serving))
    check_available(choice, serving.backend)
    warnings = Warnings()
    sampling = to_sampling(chat, serving.backend.defaults, info, warnings)
    check_supports(chat, choice, sampling)
    mode = to_stream_mode(chat, choice.strategy)
    check_chains(choice, settings)
    steers = to_controls(chat, choice, serving.backend, warnings)
    thoughts = thinking(chat, info)
    rendered = await render(chat, serving.backend, thoughts)
    budget = to_budget(thoughts, rendered)
    check_budget(choice, budget)
    max_tokens = to_max_tokens(chat, choice, settings, info.context - len(rendered.tokens), warnings)
    ceiling = total(chat, settings)
    task = Task(
        prompt=rendered.tokens,
        max_tokens=max_tokens,
        sampling=sampling,
        thinking_budget=budget,
        max_total_tokens=ceiling,
        phase=rendered.phase,
        seed=to_seed(chat),
        logprobs=(chat.top_logprobs or 0) if chat.logprobs else None,
        question=question(chat),
        interval=to_interval(chat, choice, max_tokens, ceiling),
        stop=chat.stops,
    )
    return Plan(
        request_id=request_id,
        model=chat.model,
        task=task,
        strategy=choice.strategy,
        options=choice.options,
        timeout_s=to_timeout(chat, headers, settings, warnings),
        stream_mode=mode if chat.stream else "winner",
        preset=choice.preset,
        salt=salt,
        warnings=(*thoughts.warnings, *warnings.texts),
        include_reasoning=includes_reasoning(chat),
        usage_scope=settings.usage_scope,
        controls=steers,
        over=choice.over,
        asked=choice.asked,
    )


def question(chat: ChatRequest) -> str:
    """What the user asked last, as text."""
    asked = [message.text for message in chat.messages if message.role == "user"]
    return asked[-1] if asked else ""


def check_supports(chat: ChatRequest, choice: Choice, sampling: Sampling) -> None:
    """ApiError 400 for a field that means nothing, or something else, under the chosen strategy."""
    name, supports, chains = (choice.strategy.id, choice.strategy.supports, choice.options.chains())

    def refuse(param: str, why: str, code: str = "unsupported_parameter") -> ApiError:
        return ApiError(400, code, f"{param} {why}.", param=param)

    if chat.logprobs and not supports.logprobs:
        raise refuse("logprobs", f"cannot be combined with strategy {name!r}")
    if (chat.seed is not None or (chat.choice and chat.choice.seed is not None)) and not supports.seed:
        raise refuse("seed", f"cannot be combined with strategy {name!r}")
    if chat.logit_bias and chains > 1:
        raise refuse("logit_bias", f"cannot be combined with the {chains} chains of strategy {name!r}")
    if sampling.greedy and chains > 1:
        why = f"0 would make all {chains} chains of strategy {name!r} the same"
        raise refuse("temperature", why, "value_out_of_range")
    if chat.choice and chat.choice.trace == "full":
        raise refuse("strategy.trace", "'full' is not available on this server")


def check_chains(choice: Choice, settings: Settings) -> None:
    """ApiError 400 when the strategy would run more chains than the operator allows."""
    chains = choice.options.chains()
    if chains > settings.max_chains:
        message = f"{chains} chains are asked for; this server runs at most {settings.max_chains} per request."
        raise ApiError(400, "value_out_of_range", message, param=choice.param)


def to_controls(chat: ChatRequest, choice: Choice, backend: Backend, warnings: Warnings) -> tuple[Steer, ...]:
    """The steering that the request adds to its strategy. ApiError 400 invalid_steering, for the strategy's own too."""
    steers = to_steers(chat.choice.steer if chat.choice else ())
    own = [(choice.param, control) for control in choice.options.controls() if isinstance(control, Steer)]
    if len(own) + len(steers) > MAX_STEERS:
        message = f"At most {MAX_STEERS} steering vectors act on one chain, those of the strategy included."
        raise invalid(message, "strategy.steer")
    for where, steer in [*own, *((f"strategy.steer.{index}", each) for index, each in enumerate(steers))]:
        vector = check_steer(steer, backend.vectors, backend.info, where)
        if backend.vectors is not None and foreign(vector, backend.vectors):
            warnings.add(f"steering vector {vector.name!r} was made for another model")
    return steers


def to_sampling(chat: ChatRequest, defaults: Sampling, info: ModelInfo, warnings: Warnings) -> Sampling:
    """The request's sampling over the model's defaults."""
    names = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
    given: dict[str, Any] = {name: float(value) for name in names if (value := getattr(chat, name)) is not None}
    sampling = replace(defaults, **given)
    if chat.top_k is not None:
        sampling = replace(sampling, top_k=max(chat.top_k, 0))
    if 0 < sampling.temperature < COLDEST:
        warnings.add(f"temperature {sampling.temperature:g} raised to {COLDEST}")
        sampling = replace(sampling, temperature=COLDEST)
    return replace(sampling, logit_bias=to_bias(chat.logit_bias or {}, info)) if chat.logit_bias else sampling


def to_bias(bias: Mapping[str, float], info: ModelInfo) -> tuple[tuple[int, float], ...]:
    """Biases by token id, in order of id. ApiError 400 for a key that is no token of the model."""
    for key in bias:
        if not (key.isascii() and key.isdigit() and len(key) <= 9 and int(key) < info.vocab_size):
            message = f"logit_bias: {clean(key, 20)!r} is not a token id below {info.vocab_size}."
            raise ApiError(400, "value_out_of_range", message, param=f"logit_bias.{clean(key, 20)}")
    return tuple(sorted((int(key), float(value)) for key, value in bias.items()))


async def render(chat: ChatRequest, backend: Backend, thoughts: Thinking) -> Rendered:
    """The prompt. Raises TooLong when no token would fit behind it, ApiError 400 for what the template refuses."""
    try:
        rendered = await backend.render([message.template() for message in chat.messages], thinking=thoughts.enabled)
    except BadOptions as error:
        raise ApiError(400, "value_out_of_range", str(error), param=error.param or "messages") from None
    if len(rendered.tokens) >= backend.info.context:
        raise TooLong(len(rendered.tokens), backend.info.context)
    return rendered


def to_budget(thoughts: Thinking, rendered: Rendered) -> int | None:
    """The thinking budget of a chain, given where generation starts."""
    if rendered.phase == "answer":
        return None
    # A template that ignores its switch leaves thinking open; closing it at once is what was asked for.
    return 0 if thoughts.enabled is False else thoughts.budget


def to_max_tokens(chat: ChatRequest, choice: Choice, settings: Settings, room: int, warnings: Warnings) -> int:
    """Tokens per chain: what was asked for, cut to the context; ApiError 400 when all chains together are too many."""
    given = {value for value in (chat.max_tokens, chat.max_completion_tokens) if value is not None}
    if len(given) > 1:
        message = "max_tokens and max_completion_tokens differ; send one of them."
        raise ApiError(400, "conflicting_parameters", message, param="max_tokens")
    asked = next(iter(given), None)
    if asked is not None and asked > room:
        warnings.add(f"max_completion_tokens {asked} cut to the {room} tokens that the context has left")
    tokens = min(asked or room, room)
    chains, most = choice.options.chains(), settings.max_request_tokens
    if chains * tokens <= most or (total(chat, settings) < most):
        return tokens
    if asked is None and most >= chains:
        warnings.add(f"max_completion_tokens set to {most // chains}: {chains} chains may take {most} tokens together")
        return most // chains
    message = f"{chains} chains of {tokens} tokens exceed this server's limit of {most} tokens per request."
    raise ApiError(400, "value_out_of_range", message, param="max_completion_tokens" if asked else choice.param)


def total(chat: ChatRequest, settings: Settings) -> int:
    """Tokens that all chains may generate together: the client's ceiling within the operator's."""
    asked = chat.choice.max_total_tokens if chat.choice else None
    return min(asked or settings.max_request_tokens, settings.max_request_tokens)


def to_interval(chat: ChatRequest, choice: Choice, max_tokens: int, ceiling: int) -> int:
    """Tokens per delta of chains that the strategy does not look at: several if nothing else does, and none is bound.

    Everybody else's tokens wait while one is handed on through the layers of a request.
    """
    watched, bound = chat.stream or chat.stops or chat.logprobs, choice.options.chains() * max_tokens > ceiling
    return 1 if watched or bound else UNWATCHED


def to_seed(chat: ChatRequest) -> int | None:
    """The request's seed, if it names one. ApiError 400 when two are given that differ."""
    nested = chat.choice.seed if chat.choice else None
    if chat.seed is not None and nested is not None and chat.seed != nested:
        message = f"seed ({chat.seed}) and strategy.seed ({nested}) disagree."
        raise ApiError(400, "conflicting_parameters", message, param="strategy.seed")
    return chat.seed if chat.seed is not None else nested


def to_timeout(chat: ChatRequest, headers: Headers, settings: Settings, warnings: Warnings) -> float:
    """Seconds for the whole request: the shorter of body and header, else the server's default."""
    given = [chat.choice.timeout_s] if chat.choice and chat.choice.timeout_s else []
    if (text := headers.get(TIMEOUT_HEADER)) is not None:
        if not (text.isascii() and text.isdigit() and len(text) <= 15 and int(text) > 0):
            message = f"{TIMEOUT_HEADER} must be a positive number of milliseconds."
            raise ApiError(400, "value_out_of_range", message, param=TIMEOUT_HEADER)
        given.append(int(text) / 1000)
    most = max(LONGEST_TIMEOUT_S, settings.request_timeout_s)
    asked = min(given, default=settings.request_timeout_s)
    if asked > most:
        warnings.add(f"timeout cut to {most:g} s")
    return min(asked, most)


def to_stream_mode(chat: ChatRequest, strategy: Strategy) -> StreamMode:
    """Whose reasoning is streamed. ApiError 400 when the strategy has no such mode."""
    asked, offered = (chat.choice.stream if chat.choice else None, strategy.supports.stream)
    if asked is not None and asked not in offered:
        message = f"Strategy {strategy.id!r} streams {', '.join(offered)}; not {asked!r}."
        raise ApiError(400, "unsupported_parameter", message, param="strategy.stream")
    return asked or ("winner" if "winner" in offered else offered[0])


def includes_reasoning(chat: ChatRequest) -> bool:
    """Whether thoughts go into the response. ApiError 400 when two switches disagree."""
    excluded = chat.reasoning.exclude if chat.reasoning else None
    if chat.include_reasoning is not None and excluded is not None and chat.include_reasoning == excluded:
        message = "include_reasoning and reasoning.exclude disagree."
        raise ApiError(400, "conflicting_parameters", message, param="reasoning.exclude")
    return chat.include_reasoning is not False and not excluded
