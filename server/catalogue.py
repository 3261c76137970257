"""The strategies as a table for people: in the terminal, and in README, where a test compares it."""

from __future__ import annotations

from collections.abc import Iterator

from thinkserve.strategies import registry

COLUMNS = ("strategy", "parameters", "what it does", "reference")


def rows() -> Iterator[tuple[str, str, str, str]]:
    """One row for each registered strategy, its parameters with their defaults."""
    for name in registry.names():
        entry = registry.get(name)
        defaults = entry.options().model_dump(mode="json")
        parameters = ", ".join(f"{key}={value}" for key, value in defaults.items() if value is not None)
        yield entry.id, parameters, entry.summary, entry.reference or ""


def markdown() -> str:
    """The table in README's notation."""
    lines = [COLUMNS, ("---",) * len(COLUMNS)]
    lines += [(f"`{name}`", f"`{parameters}`" if parameters else "", *rest) for name, parameters, *rest in rows()]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
