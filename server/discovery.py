"""What a client can find out beforehand: models with their presets, strategies with their parameters.

Pure: everything follows from the configuration, the model and the registry, and so does the ETag.
"""

from __future__ import annotations

import json
from functools import cache
from hashlib import sha256
from typing import Any

from thinkserve.server.budget import ladder
from thinkserve.server.choice import preset_choice
from thinkserve.server.errors import ApiError, clean
from thinkserve.server.modifier_types import ModifierCard
from thinkserve.server.needs import abilities, check_available, lacking, lost, missing_roles
from thinkserve.server.plan import Backend
from thinkserve.server.settings import Preset, Settings
from thinkserve.server.translate import (
    Serving,
    check_chains,
    served_name,
)
from thinkserve.server.validation import nearest
from thinkserve.server.wire_types import ModelCard, ModelList, ReasoningCard, StrategyCard, StrategyList
from thinkserve.strategies import registry
from thinkserve.strategies.errors import UnknownStrategy
from thinkserve.strategies.modifiers import Modifier, misfit, modifiers
from thinkserve.strategies.registry import Options, Strategy

SUPPORTED = [
    "strategy", "reasoning", "reasoning_effort", "include_reasoning", "thinking_token_budget", "max_tokens",
    "max_completion_tokens", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "logit_bias", "logprobs", "top_logprobs", "seed", "stop", "stream", "stream_options",
]  # fmt: skip
REQUIRES = {
    "guide": "draft_model", "reward": "prm", "verifier": "verifier", "steering": "hidden_states",
    "guidance": "budget_predictor",
}  # fmt: skip


def models(serving: Serving, created: int) -> ModelList:
    """Cards of the served model and of each of its presets that can run."""
    presets = [name for name in serving.settings.presets if runs(serving, name)]
    return {"object": "list", "data": [_card(serving, created, preset) for preset in [None, *presets]]}


def runs(serving: Serving, preset: str) -> bool:
    """Whether a request for the preset would not be refused for what this server has and allows."""
    choice = preset_choice(preset, serving.settings, "model")
    try:
        check_available(choice, serving.backend)
        check_chains(choice, serving.settings)
    except ApiError:
        return False
    return True


def model(serving: Serving, created: int, name: str) -> ModelCard:
    """The card of one model. ApiError 404 when there is none of that name."""
    cards = {card["id"]: card for card in models(serving, created)["data"]}
    if name not in cards:
        message = f"Unknown model {clean(name)!r}.{nearest(name, cards)} Available: {', '.join(cards)}."
        raise ApiError(404, "model_not_found", message, param="model")
    return cards[name]


def strategies(serving: Serving) -> StrategyList:
    """Cards of all registered strategies and modifiers."""
    layers = [modifier_card(serving, entry) for entry in modifiers().values()]
    return {"object": "list", "data": [strategy(serving, name) for name in registry.names()], "modifiers": layers}


def strategy(serving: Serving, name: str) -> StrategyCard:
    """The card of one strategy, by id or alias. ApiError 404 when there is none of that name."""
    try:
        entry = registry.get(name if len(name) <= 64 else "")
    except UnknownStrategy as error:
        message = f"Unknown strategy {clean(name)!r}.{nearest(name, error.known)} Available: {', '.join(error.known)}."
        raise ApiError(404, "unknown_strategy", message, param="name") from None
    return strategy_card(serving, entry)


def strategy_card(serving: Serving, entry: Strategy) -> StrategyCard:
    """What a client needs to know to use a strategy here."""
    reason = unavailable(entry, serving.backend)
    supports = entry.supports
    return {
        "id": entry.id,
        "object": "strategy",
        "title": entry.title,
        "aliases": list(entry.aliases),
        "version": entry.version,
        "summary": entry.summary,
        "params_schema": params_schema(entry),
        "defaults": entry.defaults,
        "limits": limits(entry, serving.settings),
        "requires": [REQUIRES[each] for each in (*entry.roles, *entry.needs) if each in REQUIRES],
        "available": reason is None,
        "unavailable_reason": reason,
        "supports": {
            "stream": list(supports.stream),
            "n": False,
            "tools": False,
            "response_format": False,
            "logprobs": supports.logprobs,
            "seed": supports.seed,
            "steer": serving.backend.vectors is not None,
            "over": [
                each.id
                for each in modifiers().values()
                if misfit(each, entry) is None and not missing_roles(each, serving.backend)
            ],
        },
        "presets": [key for key, preset in serving.settings.presets.items() if _means(preset, entry)],
        "reference": entry.reference,
    }


def modifier_card(serving: Serving, entry: Modifier) -> ModifierCard:
    """What a client needs to know to put a modifier below a strategy here."""
    return {
        "id": entry.id,
        "object": "modifier",
        "title": entry.title,
        "summary": entry.summary,
        "params_schema": params_schema(entry),
        "defaults": entry.defaults,
        "requires": [REQUIRES[role] for role in entry.roles if role in REQUIRES],
        "available": not missing_roles(entry, serving.backend),
        "reference": entry.reference,
    }


def unavailable(entry: Strategy, backend: Backend) -> str | None:
    """Why a strategy cannot run here; None when it can."""
    if missing := missing_roles(entry, backend):
        return f"no model is configured for: {', '.join(missing)}"
    if gone := lost(entry.roles, backend):
        return f"not available at the moment: {gone}"
    return lacking(entry, abilities(backend))


def params_schema(entry: Strategy | Modifier) -> dict[str, Any]:
    """JSON Schema 2020-12 of the parameters of a strategy or modifier."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **_schema(entry.options)}


def limits(entry: Strategy, settings: Settings) -> dict[str, float]:
    """The largest value of every bounded parameter, and how many chains the operator allows a request."""
    properties: dict[str, Any] = _schema(entry.options).get("properties", {})
    bounds = {name: _maximum(schema) for name, schema in properties.items()}
    return {name: bound for name, bound in bounds.items() if bound is not None} | {"chains": settings.max_chains}


def etag(document: object) -> str:
    """A strong validator of a document."""
    return f'"{sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:32]}"'


@cache
def _schema(options: type[Options]) -> dict[str, Any]:
    # Making them all takes so long that streams would stall whenever somebody asks.
    return options.model_json_schema()


def _maximum(schema: dict[str, Any]) -> float | None:
    branches = [schema, *schema.get("anyOf", ())]
    return next((branch["maximum"] for branch in branches if "maximum" in branch), None)


def _card(serving: Serving, created: int, preset: str | None) -> ModelCard:
    served, settings = served_name(serving), serving.settings
    return {
        "id": served if preset is None else f"{served}:{preset}",
        "object": "model",
        "created": created,
        "owned_by": "thinkserve",
        "root": served,
        "parent": None if preset is None else served,
        "description": "" if preset is None else settings.presets[preset].description,
        "max_model_len": serving.backend.info.context,
        "reasoning": _reasoning(serving.backend),
        "strategies": [registry.get(settings.presets[preset].strategy).id] if preset else registry.names(),
        "supported_parameters": SUPPORTED,
    }


def _reasoning(backend: Backend) -> ReasoningCard | None:
    if not backend.info.reasons:
        return None
    budgets = {str(effort): tokens for effort, tokens in ladder(backend.info).items()}
    return {"efforts": list(budgets), "budgets": budgets, "default_effort": None, "max_budget": backend.info.context}


def _means(preset: Preset, entry: Strategy) -> bool:
    return preset.strategy in (entry.id, *entry.aliases)
