"""The strategies as a table for people: in the terminal, and in README, where a test compares it."""

from __future__ import annotations

from collections.abc import Iterator

from thinkserve.strategies import registry

WIDEST = 24
COLUMNS = ("strategy", "parameters", "what it does", "reference")


def rows() -> Iterator[tuple[str, str, str, str]]:
    """One row for each registered strategy, its parameters with their defaults."""
    for name in registry.names():
        entry = registry.get(name)
        given = [f"{key}={written(value)}" for key, value in entry.defaults.items() if value not in (None, [])]
        required = [key for key, field in entry.options.model_fields.items() if field.is_required()]
        parameters = ", ".join([*required, *given])
        yield entry.id, parameters, entry.summary, entry.reference or ""


def written(value: object) -> str:
    """A default on one line; what would not fit stands in `/v1/strategies`."""
    text = str(value).replace("\n", "\\n")
    return text if len(text) <= WIDEST else "..."


def markdown() -> str:
    """The table in README's notation."""
    lines = [COLUMNS, ("---",) * len(COLUMNS)]
    lines += [(f"`{name}`", f"`{parameters}`" if parameters else "", *rest) for name, parameters, *rest in rows()]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
