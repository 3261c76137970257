"""What strategies need of a deployment, models and abilities: told alike by discovery, to clients and at start."""

from __future__ import annotations

from collections.abc import Container, Mapping

from thinkserve.server.choice import Choice
from thinkserve.server.errors import ApiError
from thinkserve.server.plan import Backend
from thinkserve.strategies.controls import Guide
from thinkserve.strategies.engine import Role
from thinkserve.strategies.modifiers import Modifier, misfit
from thinkserve.strategies.registry import Need, Strategy

LACKING: dict[Need, str] = {
    "steering": "the engine does not steer",
    "guidance": "the model has no budget predictor; `thinkserve budget train` makes one",
}


# Without the others strategies go on as best they can, unless they are told to fail; without scores there is no search.
VITAL: Role = "reward"


def lost(roles: Container[Role], backend: Backend) -> Role | None:
    """The model without which none of these roles' strategies can go on, if it has gone."""
    return VITAL if VITAL in roles and not backend.roles[VITAL].alive else None


def abilities(backend: Backend) -> Mapping[Need, bool]:
    """What the engine can do of what strategies may need."""
    return {"steering": backend.vectors is not None, "guidance": backend.guides}


def lacking(strategy: Strategy, able: Mapping[Need, bool]) -> str | None:
    """Why a strategy cannot run on an engine with these abilities; None when it can."""
    return next((LACKING[need] for need in strategy.needs if not able[need]), None)


def check_available(choice: Choice, backend: Backend) -> None:
    """ApiError 400 when this deployment lacks what the strategy, its parameters or its modifiers need."""
    check_roles(choice.strategy, backend)
    check_asked(choice, backend)
    check_needs(choice.strategy, backend)
    check_over(choice, backend)


def missing_roles(strategy: Strategy | Modifier, backend: Backend) -> list[str]:
    """Roles that the strategy or modifier needs and this deployment does not have."""
    return [role for role in strategy.roles if role not in backend.roles]


def check_roles(strategy: Strategy, backend: Backend) -> None:
    """ApiError 400 strategy_unavailable when a role that the strategy needs is not configured."""
    if missing := missing_roles(strategy, backend):
        message = f"Strategy {strategy.id!r} needs a model that is not configured: {', '.join(missing)}."
        raise ApiError(400, "strategy_unavailable", message, param="strategy")


def check_asked(choice: Choice, backend: Backend) -> None:
    """ApiError 400 strategy_unavailable when a parameter asks for a model that is not configured."""
    for name, role in choice.options.roles().items():
        if role not in backend.roles:
            message = f"{name} needs a model that is not configured: {role}."
            # The parameters of a preset are the operator's.
            where = f"{choice.param}.{name}" if choice.preset is None else choice.where
            raise ApiError(400, "strategy_unavailable", message, param=where)


def check_over(choice: Choice, backend: Backend) -> None:
    """ApiError 400 when modifiers cannot lie below the strategy, or need a model that is not configured."""
    for index, layer in enumerate(choice.over):
        if (reason := misfit(layer.modifier, choice.strategy)) is not None:
            raise ApiError(400, "unsupported_parameter", f"{reason}.", param=f"strategy.over.{index}")
        if missing := missing_roles(layer.modifier, backend):
            message = f"Modifier {layer.modifier.id!r} needs a model that is not configured: {', '.join(missing)}."
            raise ApiError(400, "strategy_unavailable", message, param=f"strategy.over.{index}")


def check_needs(strategy: Strategy, backend: Backend) -> None:
    """ApiError 400 strategy_unavailable when the engine lacks what the strategy needs."""
    if reason := lacking(strategy, abilities(backend)):
        message = f"Strategy {strategy.id!r} is not available: {reason}."
        raise ApiError(400, "strategy_unavailable", message, param="strategy")


def check_budget(choice: Choice, budget: int | None) -> None:
    """ApiError 400 when a strategy is to guide its chains towards no `budget`, neither its own nor the request's."""
    own = any(isinstance(control, Guide) for control in choice.options.controls())
    if "guidance" in choice.strategy.needs and not own and budget is None:
        # The parameters of a preset are the operator's.
        param = f"{choice.param}.budget" if choice.preset is None else "thinking_token_budget"
        message = f"Strategy {choice.strategy.id!r} needs a budget: its own or the request's thinking_token_budget."
        raise ApiError(400, "missing_field", message, param=param)
