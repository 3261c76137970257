"""Shapes of what is said of modifiers: in discovery, and in the report of a request that used some."""

from __future__ import annotations

from typing import Any, Literal

from typing_extensions import TypedDict


class OverReport(TypedDict):
    """A modifier below the strategy, with its effective parameters."""

    name: str
    params: dict[str, Any]


class ModifierCard(TypedDict):
    """A modifier: its parameters as JSON Schema, its defaults, and whether this server can run it."""

    id: str
    object: Literal["modifier"]
    title: str
    summary: str
    params_schema: dict[str, Any]
    defaults: dict[str, Any]
    requires: list[str]
    available: bool
    reference: str | None
