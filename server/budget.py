"""Every way to say how long a model may think, as one per-chain budget.

An explicit number wins over an effort (with a warning); two numbers or two switches that disagree are an error.
-1 is the model's default, 0 closes thinking at once, a number above the context is cut with a warning. `max` is meant
to be `xhigh` without early stopping; no strategy here stops early on its own, so both are the whole context.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeVar

from thinkserve.server.choice import effort_of
from thinkserve.server.errors import ApiError
from thinkserve.server.protocol import ChatRequest
from thinkserve.server.settings import Effort
from thinkserve.strategies.engine import ModelInfo

T = TypeVar("T")

LADDER: dict[Effort, Fraction] = {
    "none": Fraction(0), "minimal": Fraction(1, 32), "low": Fraction(1, 8), "medium": Fraction(1, 3),
    "high": Fraction(2, 3), "xhigh": Fraction(1), "max": Fraction(1),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Thinking:
    """Whether the template should open thinking (None: its default) and how many thinking tokens a chain may use."""

    enabled: bool | None
    budget: int | None
    warnings: tuple[str, ...] = ()


def ladder(info: ModelInfo) -> dict[Effort, int]:
    """The budget of every effort, in tokens, for this model."""
    return {effort: int(info.context * share) for effort, share in LADDER.items()}


def thinking(chat: ChatRequest, info: ModelInfo) -> Thinking:
    """The one budget of a request. Raises ApiError 400 when its fields contradict each other or the model."""
    effort = effort_of(chat)
    number = _agreed(_numbers(chat))
    enabled = _agreed(_switches(chat, effort))
    if not info.reasons and ((number or 0) > 0 or enabled or effort not in (None, "none")):
        raise ApiError(400, "unsupported_parameter", "This model does not mark its thinking.", param=_first(chat))
    if number is not None and number > 0 and enabled is False:
        message = f"A thinking budget of {number} tokens is given, but thinking is off."
        raise ApiError(400, "conflicting_parameters", message, param=_first(chat))
    if enabled is False or not info.reasons:
        return Thinking(enabled, None)
    if number is None:
        return Thinking(enabled, ladder(info)[effort] if effort else None)
    warnings = []
    if effort is not None:
        warnings.append(f"reasoning_effort {effort!r} gives way to the explicit thinking budget")
    if number > info.context:
        warnings.append(f"thinking budget {number} cut to the context of {info.context} tokens")
    return Thinking(enabled, None if number == -1 else min(number, info.context), tuple(warnings))


def _numbers(chat: ChatRequest) -> dict[str, int | None]:
    return {
        "thinking_token_budget": chat.thinking_token_budget,
        "reasoning.max_tokens": chat.reasoning.max_tokens if chat.reasoning else None,
        "thinking.budget_tokens": chat.thinking.budget_tokens if chat.thinking else None,
        "thinking_budget": chat.thinking_budget,
    }


def _switches(chat: ChatRequest, effort: Effort | None) -> dict[str, bool | None]:
    kwargs, kind = (chat.chat_template_kwargs, chat.thinking.type if chat.thinking else None)
    return {
        "reasoning_effort": None if effort is None else effort != "none",
        "enable_thinking": chat.enable_thinking,
        "thinking.type": None if kind is None else kind != "disabled",
        "chat_template_kwargs.enable_thinking": kwargs.enable_thinking if kwargs else None,
        "chat_template_kwargs.thinking": kwargs.thinking if kwargs else None,
        "reasoning.enabled": chat.reasoning.enabled if chat.reasoning else None,
    }


def _agreed(fields: Mapping[str, T | None]) -> T | None:
    given = {name: value for name, value in fields.items() if value is not None}
    for name, value in given.items():
        first = next(iter(given))
        if value != given[first]:
            message = f"{first} ({given[first]}) and {name} ({value}) disagree."
            raise ApiError(400, "conflicting_parameters", message, param=name)
    return next(iter(given.values()), None)


def _first(chat: ChatRequest) -> str:
    fields = {**_numbers(chat), **_switches(chat, effort_of(chat))}
    return next(name for name, value in fields.items() if value not in (None, False))
