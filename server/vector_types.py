"""Shapes of what `/v1/steering/vectors` answers; wire_types holds all others."""

from __future__ import annotations

from typing import Any, Literal

from typing_extensions import TypedDict


class VectorCard(TypedDict):
    """A steering vector: where it acts (output of blocks, counted from 0), how long it is there, where it is from.

    `content_id` is the SHA-256 of its numbers; `about` is what its maker says of it.
    """

    id: str
    object: Literal["steering_vector"]
    version: int
    content_id: str
    hidden: int
    layers: list[int]
    norms: dict[str, float]
    convention: str
    recipe: str
    model_fingerprint: str | None
    made_for_this_model: bool | None
    about: dict[str, Any]


class VectorList(TypedDict):
    """All steering vectors."""

    object: Literal["list"]
    data: list[VectorCard]


class VectorDeleted(TypedDict):
    """A vector that is no more."""

    id: str
    object: Literal["steering_vector"]
    deleted: bool
