"""Thinking cut into thoughts: a new one begins with a paragraph that turns round, such as "Wait" or "Alternatively".

A model that has written many paragraphs without any such word does not use them: then every paragraph is a thought.
"""

from __future__ import annotations

from collections.abc import Sequence

from thinkserve.strategies.engine import Engine
from thinkserve.strategies.text import answer_of

MARKERS = (
    "Wait", "But", "However", "Alternatively", "Hmm", "Hold on", "Let me", "Actually", "Another", "Is there",
    "Double-check", "Okay, let me",
)  # fmt: skip


class Segmenter:
    """Push text, get the thoughts that it completes; `patience` paragraphs without a marker are waited for.

    `begun`: the last push held a paragraph's first character; `undecided`: the paragraph may yet begin another thought.
    """

    def __init__(self, markers: Sequence[str] = MARKERS, patience: int = 24) -> None:
        self._markers = tuple(marker.lower() for marker in markers)
        self._longest = max(map(len, self._markers), default=0)
        self._patience = patience
        self._marked = False
        self._past = 0
        self._thought: list[str] = []
        self._paragraph = ""
        # The first paragraph begins the first thought, whatever it says.
        self.begun = self.undecided = False

    def push(self, text: str) -> list[tuple[str, ...]]:
        """More of the thinking; the thoughts that have ended, each as its paragraphs."""
        ended: list[tuple[str, ...]] = []
        self.begun = False
        for character in text:
            if character != "\n" and self._paragraph.endswith("\n\n"):
                self._thought.append(self._paragraph.strip())
                self._paragraph, self._past = "", self._past + 1
                self.begun = self.undecided = True
            self._paragraph += character
            if self.undecided and (len(self._paragraph) > self._longest or character == "\n"):
                self.undecided = False
                if self._turns():
                    ended.append(tuple(self._thought))
                    self._thought.clear()
        return ended

    def _turns(self) -> bool:
        """Whether the paragraph at hand begins a new thought."""
        words = self._paragraph.lower()
        marked = any(words.startswith(each) and not words[len(each) :][:1].isalnum() for each in self._markers)
        self._marked |= marked
        return marked or (not self._marked and self._past > self._patience)


def excerpt(thought: Sequence[str], paragraphs: int, tokens: int, engine: Engine) -> str:
    """The end of a thought in one line, as a verifier is to see it: its last paragraphs, of these its last tokens.

    Tokens are the target's, who wrote them: those of a verifier elsewhere may be known to its server alone.
    """
    text = " ".join(thought[-paragraphs:])
    encoded = engine.encode(text)
    return text if len(encoded) <= tokens else engine.decode(encoded[-tokens:])


def result(excerpt: str) -> str:
    """What an excerpt that states a result states: its answer, else its last word; of an empty one nothing."""
    return answer_of(excerpt) or " ".join(excerpt.rsplit(maxsplit=1)[-1:]).strip(".,:;!*\"'")
