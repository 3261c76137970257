"""Pure helpers over tokens and text: where thinking ends, what the answer is, where steps lie.

Everything is linear in its input; no pattern here can backtrack without bound.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from thinkserve.strategies.engine import ModelInfo, Phase, Tokens

# An answer stands at the end; what lies further back is not looked at.
BOX_WINDOW = 1 << 16
TAIL_WINDOW = 1 << 12


class Phases:
    """Labels a growing sequence of tokens as thinking or answer; tags count as "thinking" but not in `length`.

    With `phase` None the text is answer unless an opening tag comes before any closing one. Whatever follows the first
    closing tag is answer. Tags may be several tokens long.
    """

    def __init__(self, info: ModelInfo, phase: Phase | None) -> None:
        self.phase: Phase = "thinking" if phase == "thinking" and info.think_close else "answer"
        self.opened = self.phase == "thinking"
        self.closed = False
        self._close = _Tag(info.think_close)
        may_open = phase is None and bool(info.think_open) and bool(info.think_close)
        self._open = _Tag(info.think_open) if may_open else None
        self._thought = 0

    @property
    def length(self) -> int:
        """Thinking tokens so far, tags excluded; what may yet become the closing tag is not counted."""
        return self._thought - self._close.seen if self.phase == "thinking" else self._thought

    def left(self, budget: int | None) -> int | None:
        """What is left of a budget of thinking tokens; None without one, and once thinking has ended."""
        return None if budget is None or self.closed else max(0, budget - self.length)

    @property
    def held(self) -> int:
        """How many tokens have no label yet, because they may be the start of the opening tag."""
        return self._open.seen if self._open else 0

    def push(self, tokens: Sequence[int]) -> list[tuple[Phase, int]]:
        """Labels as runs (phase, count), of the tokens held so far and these; some of the last ones may be held."""
        count = len(tokens)
        if self._open is None and (self.phase == "answer" or not self._close.begins(tokens)):
            self._thought += count if self.phase == "thinking" else 0
            return [(self.phase, count)] if count else []
        runs: list[tuple[Phase, int]] = []
        for token in tokens:
            for label, size in self._one(token):
                if runs and runs[-1][0] == label:
                    runs[-1] = (label, runs[-1][1] + size)
                else:
                    runs.append((label, size))
        return runs

    def _one(self, token: int) -> list[tuple[Phase, int]]:
        if self._open is not None:
            return self._undecided(self._open, token)
        if self.phase == "answer":
            return [("answer", 1)]
        self._thought += 1
        if self._close.step(token):
            self._thought -= self._close.width
            self.phase, self.closed = "answer", True
        return [("thinking", 1)]

    def _undecided(self, tag: _Tag, token: int) -> list[tuple[Phase, int]]:
        waiting = tag.seen + 1
        if tag.step(token):
            self.phase, self.opened, self._open = "thinking", True, None
            before: list[tuple[Phase, int]] = [("answer", waiting - tag.width)] if waiting > tag.width else []
            return [*before, ("thinking", tag.width)]
        if self._close.step(token):
            self._open = None
            return [("answer", waiting)]
        return [("answer", waiting - tag.seen)] if waiting > tag.seen else []


class Stops:
    """Stop strings in an answer that grows. Its owner shows what it keeps of it, old and new, and tells what it drops.

    The white space before the answer's first word stands between thoughts and answer: what lies in it alone is no stop.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self.strings = strings
        # So many characters at the end of a text may be the beginning of a stop string.
        self.reach = max(map(len, strings), default=1) - 1
        self._blank = 0
        self._begun = False

    def find(self, text: str) -> tuple[int, int, str] | None:
        """The string that is complete first in what is kept, as (end, start, string); None if there is none."""
        if not self._begun:
            self._blank = len(text) - len(text.lstrip())
            self._begun = self._blank < len(text)
        starts = ((text.find(stop, max(0, self._blank - len(stop) + 1)), stop) for stop in self.strings)
        return min(((at + len(stop), at, stop) for at, stop in starts if at >= 0), default=None)

    def drop(self, count: int) -> None:
        """So many characters at the beginning are kept no longer."""
        self._blank = max(0, self._blank - count)


def rfind(tokens: Tokens, wanted: Tokens) -> int:
    """Index of the last occurrence of `wanted` in `tokens`, or -1; nothing is found nowhere."""
    width = len(wanted)
    starts = range(len(tokens) - width, -1, -1) if width else range(0)
    return next((at for at in starts if tokens[at : at + width] == wanted), -1)


def before(tokens: Tokens, wanted: Tokens) -> Tokens:
    """The tokens up to the first occurrence of `wanted`; all of them where there is none."""
    width = len(wanted)
    starts = range(len(tokens) - width + 1) if width else range(0)
    return tokens[: next((at for at in starts if tokens[at : at + width] == wanted), len(tokens))]


def last_tags(info: ModelInfo, tokens: Tokens) -> tuple[int, int]:
    """Where thinking was last opened and last closed in `tokens`: indices of the tags, -1 where there is none."""
    return rfind(tokens, info.think_open), rfind(tokens, info.think_close)


class _Tag:
    """Finds a tag in a stream of tokens, one at a time (Knuth-Morris-Pratt)."""

    def __init__(self, tag: Tokens) -> None:
        self.width = len(tag)
        self.seen = 0
        self._tag = tag
        self._back = [0] * (len(tag) + 1)
        for at in range(1, len(tag)):
            self._back[at + 1] = self._advance(self._back[at], tag[at])

    def begins(self, tokens: Sequence[int]) -> bool:
        """Whether the tag may begin, or go on, in these tokens."""
        return self.seen > 0 or self._tag[0] in tokens

    def step(self, token: int) -> bool:
        """Take the next token; true when it completes the tag."""
        if not self.width:
            return False
        self.seen = self._advance(self.seen, token)
        if self.seen < self.width:
            return False
        self.seen = 0
        return True

    def _advance(self, seen: int, token: int) -> int:
        while seen and self._tag[seen] != token:
            seen = self._back[seen]
        return seen + 1 if self._tag[seen] == token else 0


def boxed(text: str) -> str | None:
    r"""Content of the last balanced, non-empty `\boxed{}` (or `\fbox{}`), its braces nested at will."""
    open_boxes: list[tuple[int, bool]] = []
    best: tuple[int, str] | None = None
    window = text[-BOX_WINDOW:]
    for mark in _BRACE.finditer(window):
        if mark[0].endswith("{") and len(mark[0]) != 2:
            open_boxes.append((mark.end(), len(mark[0]) > 1))
        elif mark[0] == "}" and open_boxes:
            start, is_box = open_boxes.pop()
            content = window[start : mark.start()].strip()
            if is_box and content and (best is None or start > best[0]):
                best = (start, content)
    return best[1] if best else None


_BRACE = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)


def final_number(text: str) -> str | None:
    """The last number: sign, thousands separators, decimals, exponent, (mixed) fraction and percent sign included."""
    found = _NUMBER.findall(text[-TAIL_WINDOW:])
    return re.sub(r"(?<!\d)\s|\s(?!\d)|\$", "", found[-1]) if found else None


# A sign counts only where it cannot be an operator: "10-5" ends in 5.
_NUMBER = re.compile(
    r"(?<![\w.])[-+\u2212]?\$?(?:\d+[ ](?=\d+/\d))?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?:(?<=\d)(?:\.\d+)?|\.\d+)"
    r"(?:[eE][-+]?\d{1,4}(?!\d))?(?:[ ]?/[ ]?\d+)?(?:[ ]?\\?%)?"
)


def option(text: str) -> str | None:
    """The letter of a multiple-choice answer that a cue announces: "Answer: C", "the answer is (b)"."""
    return _last_letter(_CUED, text)


def bare_option(text: str) -> str | None:
    """The last letter that stands alone in brackets: "(B)"."""
    return _last_letter(_BRACKETED, text)


def _last_letter(pattern: re.Pattern[str], text: str) -> str | None:
    found = pattern.findall(text[-TAIL_WINDOW:])
    return "".join(found[-1]).upper() if found else None


_CUED = re.compile(
    r"\b(?:answer|option|choice)\b(?:[ ]is)?[ ]?:?[*\s]{0,8}(?:\(([A-Ja-j])\)|([A-J])(?=[*\s]{0,8}(?:[).,;:]|$|\n)))",
    re.IGNORECASE,
)
_BRACKETED = re.compile(r"(?<!\w)\(([A-J])\)")


def answer_of(text: str) -> str | None:
    r"""The answer in the text after thinking: last `\boxed{}`, else a cued letter, the last number, a bracketed letter.

    None when there is nothing to compare.
    """
    for rule in (boxed, option, final_number, bare_option):
        if (found := rule(text)) is not None:
            return found
    return None


def steps(text: str) -> list[str]:
    """The text cut after every blank line; the parts, concatenated, are the text."""
    return [step for step in _STEP.findall(text) if step]


_STEP = re.compile(r"(?:[^\n]|\n(?!\n))*(?:\n\n+)?")
