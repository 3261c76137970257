"""Where sentences and lines of a growing text end."""

from __future__ import annotations

from thinkserve.strategies.engine import Engine, Tokens


class Sentences:
    """Follows a text token by token and knows, at each, whether a sentence or line ended before it.

    `text` is what the last tokens stand for.
    """

    def __init__(self, engine: Engine) -> None:
        self._decoder = engine.detokenizer()
        self._tail = ""
        self.text = ""

    def ended(self, tokens: Tokens) -> bool:
        """Whether the text before `tokens` ended a line or sentence; their own first character may tell."""
        before, self.text = self._tail, self._decoder.push(tokens)
        self._tail = (before + self.text)[-2:]
        if before.endswith("\n"):
            return True
        last = before[:1] if before[1:].isspace() else before[-1:] if self.text[:1].isspace() else ""
        return last in {".", "?", "!"}
