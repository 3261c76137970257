"""How a report leaves the worker: as one more attribute of the model runner's output of the same step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

# A report by request id and name; calling it may wait for the device.
Later = Callable[[], Mapping[str, Mapping[str, Any]]]


def joined(parts: Iterable[Later | None]) -> Later | None:
    """Several reports as one; None when there is none."""
    said = [later for later in parts if later is not None]
    if len(said) == 1:
        return said[0]
    return (lambda: _merged(said)) if said else None


def reported(output: Any, name: str, later: Later | None) -> Any:
    """The runner's output with the report as attribute `name`, for our scheduler."""
    if later is None or output is None:
        return output
    if hasattr(output, "get_output"):
        # Steps overlap: this one's output is fetched when the device has come so far, perhaps by another thread.
        base: type = type(output)
        output.__class__, output.thinkserve_report = _late(base), (name, later)
    else:
        setattr(output, name, later())
    return output


@cache
def _late(base: type) -> type:
    fetch: Callable[[Any], Any] = base.get_output  # type: ignore[attr-defined]

    def get_output(self: Any) -> Any:
        output = fetch(self)
        name, later = self.thinkserve_report
        setattr(output, name, later())
        return output

    return type(f"Thinkserve{base.__name__}", (base,), {"get_output": get_output})


def _merged(said: Iterable[Later]) -> dict[str, dict[str, Any]]:
    merged: dict[str, dict[str, Any]] = {}
    for later in said:
        for request_id, values in later().items():
            merged.setdefault(request_id, {}).update(values)
    return merged
