"""What strategies need of the engine beyond models: told alike by discovery, to clients at the edge and at start."""

from __future__ import annotations

from collections.abc import Collection

from thinkserve.server.choice import Choice
from thinkserve.server.errors import ApiError
from thinkserve.server.plan import Backend
from thinkserve.strategies.controls import Guide
from thinkserve.strategies.registry import Need, Strategy

LACKING: dict[Need, str] = {
    "steering": "the engine does not steer",
    "guidance": "the model has no budget predictor; `thinkserve budget train` makes one",
}


def abilities(backend: Backend) -> set[Need]:
    """What the engine can do of what strategies may need."""
    able: dict[Need, bool] = {"steering": backend.vectors is not None, "guidance": backend.guides}
    return {need for need, there in able.items() if there}


def lacking(strategy: Strategy, able: Collection[Need]) -> str | None:
    """Why a strategy cannot run on an engine with these abilities; None when it can."""
    return next((LACKING[need] for need in strategy.needs if need not in able), None)


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
