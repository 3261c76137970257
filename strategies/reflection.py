"""What a stretch of thinking does, told by its words: state, affirm or doubt (arXiv:2504.12329, section 3.1).

Words count anywhere, also inside other words, in upper and lower case alike: that is how the lists were made.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

Label = Literal["statement", "affirmation", "reflection"]
Word = Annotated[str, StringConstraints(min_length=1, max_length=40)]
Words = Annotated[tuple[Word, ...], Field(max_length=64)]
# A list, or lists by language; all of them are looked for.
Lists = Words | Annotated[dict[str, Words], Field(max_length=16)]

DOUBT: Lists = {"en": ("wait", "alternatively", "hold on", "another", "verify", "think again", "recap", "check")}
CERTAINTY: Lists = {"en": ("yeah", "yes", "final answer", "confident")}
VERIFICATION: Lists = {"en": ("verify", "think again", "recap", "check")}


def hits(text: str, lists: Lists) -> int:
    """How often any of the words occurs in the text."""
    words = [word for each in lists.values() for word in each] if isinstance(lists, dict) else lists
    lowered = text.lower()
    return sum(lowered.count(word.lower()) for word in words)


def label(text: str, doubt: Lists = DOUBT, certainty: Lists = CERTAINTY) -> Label:
    """More certainty is affirmation, more doubt or as much of both is reflection, neither is a statement."""
    sure, unsure = hits(text, certainty), hits(text, doubt)
    if sure > unsure:
        return "affirmation"
    return "reflection" if unsure else "statement"
