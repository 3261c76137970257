"""Which strategy serves a request: body, `reasoning.mode`, header, model suffix, effort map, default; first one wins.

Two explicit choices that do not come to the same strategy and parameters are an error that names both: a parameter
that is silently passed over is a wrong experiment. The text of messages is never looked at.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, Protocol

from pydantic import ValidationError

from thinkserve.server import header_item
from thinkserve.server.errors import ApiError, clean
from thinkserve.server.protocol import ChatRequest
from thinkserve.server.settings import Effort, Settings
from thinkserve.server.validation import from_pydantic, nearest
from thinkserve.strategies import registry
from thinkserve.strategies.errors import BadOptions, UnknownStrategy
from thinkserve.strategies.modifiers import Layer, Modifier, misfit, modifiers
from thinkserve.strategies.registry import Options, Strategy

HEADER = "X-Reasoning-Strategy"
MODE = "reasoning.mode"
MAX_VALUES = 4096


@dataclass(frozen=True, slots=True)
class Choice:
    """A strategy with checked options; `where` is the field that chose it, `param` where its parameters stand.

    `over` are the modifiers below it, the first one next to it; the body or a preset can name some.
    """

    strategy: Strategy
    options: Options
    where: str
    param: str = "strategy.params"
    preset: str | None = None
    over: tuple[Layer, ...] = ()

    @property
    def asked(self) -> bool:
        """Whether the request names it, and does not merely leave it to the server."""
        return self.where not in {"default", "reasoning_effort"}

    def written(self) -> str:
        """The choice as it appears in the response header: every effective parameter."""
        return header_item.write(self.strategy.id, self.options.model_dump(mode="json"))


def choose(chat: ChatRequest, headers: Sequence[str], settings: Settings, served: str) -> Choice:
    """The choice for a request; `headers` are the values of X-Reasoning-Strategy.

    Raises ApiError: 404 model_not_found, 400 unknown_strategy, unknown_parameter, conflicting_strategy and others.
    """
    preset = preset_of(chat.model, settings, served)
    explicit = list(_explicit(chat, headers, preset, settings))
    for one, other in combinations(explicit, 2):
        if not _same(one, other):
            raise _conflict(one, other)
    if explicit:
        return next((each for each in explicit if each.over), explicit[0])
    mapped = settings.effort_map.get(effort) if (effort := effort_of(chat)) else None
    if mapped is not None:
        return preset_choice(mapped, settings, "reasoning_effort", "reasoning_effort")
    return resolve(settings.default_strategy, {}, settings, where="default")


def preset_of(model: str, settings: Settings, served: str) -> str | None:
    """The preset that a model name asks for: exact name first, then `served:preset`. ApiError 404 for other names."""
    if model == served:
        return None
    base, _, suffix = model.rpartition(":")
    if base == served and suffix in settings.presets:
        return suffix
    names = [served, *(f"{served}:{preset}" for preset in settings.presets)]
    message = f"Unknown model {clean(model)!r}.{nearest(model, names)} Available: {', '.join(names)}."
    raise ApiError(404, "model_not_found", message, param="model")


def effort_of(chat: ChatRequest) -> Effort | None:
    """The effort asked for, under either name. ApiError 400 when the two differ."""
    nested = chat.reasoning.effort if chat.reasoning else None
    if chat.reasoning_effort and nested and chat.reasoning_effort != nested:
        message = f"reasoning_effort {chat.reasoning_effort!r} and reasoning.effort {nested!r} differ."
        raise ApiError(400, "conflicting_parameters", message, param="reasoning.effort")
    return chat.reasoning_effort or nested


def resolve(
    name: str, params: Mapping[str, Any], settings: Settings, *, where: str, param: str = "strategy.params"
) -> Choice:
    """A strategy (or, if there is none of that name, a preset) with its parameters checked. Raises ApiError 400."""
    try:
        strategy = registry.get(name if len(name) <= 64 else "")
    except UnknownStrategy as error:
        if name not in settings.presets:
            raise _unknown(name, [*error.known, *settings.presets], where) from None
        if params:
            message = f"The parameters of preset {name!r} are fixed."
            raise ApiError(400, "unsupported_parameter", message, param=param) from None
        return preset_choice(name, settings, where, param)
    return Choice(strategy, checked(strategy, params, param), where, param)


def preset_choice(name: str, settings: Settings, where: str, param: str = "strategy.params") -> Choice:
    """The choice that a preset stands for. Raises ApiError and UnknownStrategy for one that cannot work."""
    preset = settings.presets[name]
    strategy = registry.get(preset.strategy)
    over = layers(preset.over, f"presets.{name}.over")
    return Choice(strategy, checked(strategy, preset.params, param), where, param, name, over)


class Named(Protocol):
    """A modifier as the body or a preset names it."""

    @property
    def name(self) -> str:
        """Its name."""
        ...

    @property
    def params(self) -> dict[str, Any]:
        """Its parameters, unchecked."""
        ...


def layers(wanted: Iterable[Named], above: str) -> tuple[Layer, ...]:
    """The modifiers that are asked for. Raises ApiError 400 that points below `above`."""
    known, found = modifiers(), list[Layer]()
    for index, asked in enumerate(wanted):
        where = f"{above}.{index}"
        modifier = known.get(asked.name)
        if modifier is None:
            hint = f"{nearest(asked.name, known)} Available: {', '.join(known)}."
            message = f"Unknown modifier {clean(asked.name)!r}.{hint}"
            raise ApiError(400, "unknown_modifier", message, param=f"{where}.name")
        if any(layer.modifier is modifier for layer in found):
            raise ApiError(400, "value_out_of_range", f"Each modifier may be named once: {asked.name}.", param=where)
        found.append(Layer(modifier, checked(modifier, asked.params, f"{where}.params")))
    return tuple(found)


def checked(strategy: Strategy | Modifier, params: Mapping[str, Any], param: str = "strategy.params") -> Options:
    """The options of a strategy or modifier. Raises ApiError 400 that points below `param`."""
    if _more_than(MAX_VALUES, params):
        # Complaints about a million of them would hold up every other request.
        raise ApiError(400, "value_out_of_range", f"{param} holds more than {MAX_VALUES} values.", param=param)
    try:
        # By way of JSON, because only there does strict mode take a list for a tuple or a string for an enum.
        # YAML has more types than JSON; as text they are of the wrong type, and told so.
        return strategy.options.model_validate_json(json.dumps(params, default=str))
    except ValidationError as error:
        known = {param: strategy.options.model_fields}
        raise from_pydantic(error, dict(params), prefix=param, known=known) from None
    except BadOptions as error:
        path = f"{param}.{error.param}" if error.param else param
        raise ApiError(400, "value_out_of_range", str(error), param=path) from None


def _more_than(most: int, params: Mapping[str, Any]) -> bool:
    """Whether there are more than so many values in it, at all depths together."""
    level: list[Any] = [params]
    while level and most >= 0:
        most -= sum(map(len, level))
        items = (item for each in level for item in (each.values() if isinstance(each, Mapping) else each))
        level = [item for item in items if isinstance(item, Mapping | list)] if most >= 0 else []
    return most < 0


def check_settings(settings: Settings, served: str) -> None:
    """ValueError when a preset, the effort map or the default strategy of the configuration cannot work."""
    try:
        for name in settings.presets:
            if not re.fullmatch(r"[a-z][a-z0-9-]{0,31}", name) or name == served:
                raise ValueError(f"preset name {name!r} is not a slug, or is the name of a served model")
            _works_over(name, preset_choice(name, settings, f"presets.{name}", f"presets.{name}.params"))
        for effort, mapped in settings.effort_map.items():
            if mapped not in settings.presets:
                raise ValueError(f"effort_map: {effort} names the unknown preset {mapped!r}")
        resolve(settings.default_strategy, {}, settings, where="default_strategy")
    except UnknownStrategy as error:
        raise ValueError(str(error)) from None
    except ApiError as error:
        raise ValueError(error.message) from None


def _explicit(chat: ChatRequest, headers: Sequence[str], preset: str | None, settings: Settings) -> Iterable[Choice]:
    if chat.choice is not None:
        where = "strategy" if isinstance(chat.strategy, str) else "strategy.name"
        yield _with_layers(resolve(chat.choice.name, chat.choice.params, settings, where=where), chat.choice.over)
    if chat.reasoning is not None and chat.reasoning.mode is not None:
        yield resolve(chat.reasoning.mode, {}, settings, where=MODE)
    if headers:
        try:
            name, params = header_item.parse(", ".join(headers))
        except ValueError as error:
            raise ApiError(400, "invalid_type", f"{HEADER}: {error}.", param=HEADER) from None
        yield resolve(name, params, settings, where=HEADER, param=HEADER)
    if preset is not None:
        yield preset_choice(preset, settings, "model", "model")


def _with_layers(choice: Choice, wanted: Sequence[Named]) -> Choice:
    if wanted and choice.over:
        message = f"The modifiers of preset {choice.preset!r} are fixed."
        raise ApiError(400, "unsupported_parameter", message, param="strategy.over")
    return replace(choice, over=layers(wanted, "strategy.over")) if wanted else choice


def _works_over(name: str, choice: Choice) -> None:
    for layer in choice.over:
        if (reason := misfit(layer.modifier, choice.strategy)) is not None:
            raise ValueError(f"presets.{name}.over: {reason}")


def _same(one: Choice, other: Choice) -> bool:
    # Header and mode have no words for modifiers: unless they name a preset, they do not contradict any.
    silent = any(each.where in (HEADER, MODE) and each.preset is None for each in (one, other))
    over = silent or one.over == other.over
    return one.strategy.id == other.strategy.id and one.options == other.options and over


def _conflict(one: Choice, other: Choice) -> ApiError:
    message = f"{one.where} asks for {_told(one)}, {other.where} for {_told(other)}; send one of them."
    return ApiError(400, "conflicting_strategy", message, param=other.where)


def _unknown(name: str, names: Sequence[str], where: str) -> ApiError:
    message = f"Unknown strategy {clean(name)!r}.{nearest(name, names)} Available: {', '.join(dict.fromkeys(names))}."
    return ApiError(400, "unknown_strategy", message, param=where)


def _told(choice: Choice) -> str:
    over = ", ".join(layer.modifier.id for layer in choice.over)
    return f"{choice.written()} over {over}" if over else choice.written()
