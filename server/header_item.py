"""RFC 8941 items, as far as `X-Reasoning-Strategy: short-m-at-k; k=8; m=3` needs them: read and written.

A token or string with parameters; values are integers, decimals, strings, tokens and booleans.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

WORD = r"[A-Za-z*][A-Za-z0-9!#$%&'*+\-.^_`|~:/]*"
STRING = r'"(?:[ !#-\[\]-~]|\\["\\])*"'
NUMBER = r"-?[0-9]{1,15}(?:\.[0-9]{1,3})?"
PARAMETER = re.compile(rf" *; *([a-z*][a-z0-9_\-.*]*)(?:=({NUMBER}|{STRING}|{WORD}|\?[01]))?")
ITEM = re.compile(rf"({WORD}|{STRING})")

Bare = bool | int | float | str


def parse(text: str) -> tuple[str, dict[str, Bare]]:
    """The item and its parameters. Raises ValueError when the text is not one RFC 8941 item."""
    text = text.strip(" ")
    item = ITEM.match(text) if len(text) <= 2000 else None
    if item is None:
        raise ValueError("not a token or string with parameters")
    position, parameters = item.end(), dict[str, Bare]()
    while position < len(text):
        found = PARAMETER.match(text, position)
        if found is None:
            raise ValueError(f"not a parameter at character {position + 1}")
        parameters[found[1]] = True if found[2] is None else _bare(found[2])
        position = found.end()
    return str(_bare(item[1])), parameters


def write(name: str, parameters: Mapping[str, object]) -> str:
    """An item for a response header; values that the format cannot carry (null, lists, long text) are left out."""
    pairs = ((key, _written(value)) for key, value in parameters.items() if re.fullmatch(r"[a-z*][a-z0-9_\-.*]*", key))
    return "; ".join([name, *(f"{key}={value}" for key, value in pairs if value is not None)])


def _bare(text: str) -> Bare:
    if text.startswith("?"):
        return text == "?1"
    if text.startswith('"'):
        return re.sub(r"\\(.)", r"\1", text[1:-1])
    if re.fullmatch(NUMBER, text):
        return float(text) if "." in text else int(text)
    return text


def _written(value: object) -> str | None:
    match value:
        case bool():
            return "?1" if value else "?0"
        case int() if abs(value) < 10**15:
            return str(value)
        case float() if abs(value) < 10**12 and round(value, 3) == value:
            return f"{value:.1f}" if value % 1 == 0 else f"{value:.3f}".rstrip("0")
        case str() if re.fullmatch(WORD, value) and len(value) <= 64:
            return value
        case str() if len(value) <= 64 and value.isascii() and value.isprintable():
            return '"' + re.sub(r'(["\\])', r"\\\1", value) + '"'
    return None
