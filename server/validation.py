"""From pydantic's list of complaints to the one ApiError that helps: our codes, a dotted path, the nearest name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from thinkserve.server.errors import ApiError, clean

# A validator of ours raises PydanticCustomError with one of these as its type; context `field` extends the path.
OWN_CODES = frozenset({
    "missing_field", "unsupported_parameter", "invalid_type", "value_out_of_range", "invalid_steering",
})  # fmt: skip
TYPE_ERRORS = ("_type", "_parsing", "_from_float", "union_tag_not_found", "union_tag_invalid", "_attributes_type")


def from_pydantic(
    error: ValidationError, raw: object, *, prefix: str = "", known: Mapping[str, Iterable[str]] = {}
) -> ApiError:
    """The first complaint as ApiError 400.

    `raw` is the value that was validated, found at `prefix` in the body; `known` maps the path of an object to the
    names it may hold, for the nearest-name hint.
    """
    details = error.errors(include_url=False, include_input=False)
    worst = min(details, key=lambda one: one["type"] != "extra_forbidden")
    path = _path(worst, raw)
    param = ".".join(([prefix] if prefix else []) + path)
    return ApiError(400, _code(worst), _message(worst, param, known), param=clean(param, 200) or None)


def nearest(name: str, names: Iterable[str]) -> str:
    """A hint for a misspelt name, or nothing: ` Did you mean 'k'?`."""
    if len(name) > 64:
        return ""
    lowered = {known.lower(): known for known in names}
    found = get_close_matches(name.lower(), list(lowered), n=1, cutoff=0.5)
    return f" Did you mean {lowered[found[0]]!r}?" if found else ""


def _path(detail: ErrorDetails, raw: object) -> list[str]:
    """The part of pydantic's location that exists in the body: names of union branches are left out."""
    path: list[str] = []
    here: Any = raw
    for part in detail["loc"]:
        if _has(here, part):
            here = here[part]
        elif detail["type"] != "missing" or part != detail["loc"][-1]:
            continue
        path.append(clean(str(part)))
    extra = detail.get("ctx", {}).get("field")
    return [*path, str(extra)] if extra else path


def _has(here: object, part: int | str) -> bool:
    if isinstance(here, list):
        return isinstance(part, int) and part < len(here)
    return isinstance(here, dict) and part in here


def _code(detail: ErrorDetails) -> str:
    kind = detail["type"]
    if kind in OWN_CODES:
        return kind
    if kind == "missing":
        return "missing_field"
    if kind == "extra_forbidden":
        return "unknown_parameter"
    return "invalid_type" if kind.endswith(TYPE_ERRORS) else "value_out_of_range"


def _message(detail: ErrorDetails, param: str, known: Mapping[str, Iterable[str]]) -> str:
    parent, _, name = param.rpartition(".")
    match detail["type"]:
        case "missing":
            return f"Missing field {param}."
        case "extra_forbidden":
            names = sorted(known.get(parent, ()))
            listed = f" Known: {', '.join(names)}." if names else " It takes none."
            return f"Unknown parameter {param}.{nearest(name, names)}{listed}"
        case "union_tag_not_found":
            return f"{param}: a value of this type is not accepted here."
    text = detail["msg"].removeprefix("Value error, ")
    return f"{param}: {text}" if param else text
