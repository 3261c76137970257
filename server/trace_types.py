"""Shapes of the log that a request may ask for: what was done to its completion, and why it was chosen."""

from __future__ import annotations

from typing import Any

from typing_extensions import TypedDict


class TraceEvent(TypedDict):
    """One entry; what `data` holds is the type's: of a take-over its position, tokens, kind and label."""

    type: str
    chain: int | None
    data: dict[str, Any]


class TraceReport(TypedDict):
    """The first entries in the order in which they came, and how many more there were."""

    events: list[TraceEvent]
    omitted: int
