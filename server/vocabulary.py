"""Whether two models mean the same by a token id: what must hold before the tokens of one are given to the other."""

from __future__ import annotations

import json
from typing import Any

from thinkserve.server.model_dir import ModelDir, StartError


def difference(one: ModelDir, other: ModelDir) -> str | None:
    """The first token in which two tokenizers differ, in words for the operator; None when they agree. StartError.

    Ids, and which tokens are special (left out of the text), must be the same. Merges may differ: tokens are exchanged,
    not made anew.
    """
    mine, theirs = _tokens(one), _tokens(other)
    for token in sorted(
        mine.keys() | theirs.keys(), key=lambda token: (min(_id(mine, token), _id(theirs, token)), token)
    ):
        if mine.get(token) != theirs.get(token):
            return f"token {token!r} is {_told(mine, token)} in {one.name} and {_told(theirs, token)} in {other.name}"
    return None


def _tokens(model: ModelDir) -> dict[str, tuple[int, bool]]:
    """Id and whether it is special, by token; empty for a model without a fast tokenizer, which does not start."""
    file = model.path / "tokenizer.json"
    if not file.is_file():
        return {}
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StartError(f"Cannot read {file}: {error}") from error
    vocabulary: Any = content.get("model", {}).get("vocab", {})
    # Unigram models list their tokens in order of id.
    pairs = vocabulary.items() if isinstance(vocabulary, dict) else ((row[0], i) for i, row in enumerate(vocabulary))
    added = {str(each["content"]): (int(each["id"]), bool(each["special"])) for each in content.get("added_tokens", ())}
    return {str(token): (int(number), False) for token, number in pairs} | added


def _id(tokens: dict[str, tuple[int, bool]], token: str) -> int:
    return tokens.get(token, (1 << 62, False))[0]


def _told(tokens: dict[str, tuple[int, bool]], token: str) -> str:
    if token not in tokens:
        return "missing"
    number, special = tokens[token]
    return f"special token {number}" if special else f"{number}"
