"""From committed tokens to the two texts of a response: thoughts and answer, as they become certain.

Borders. Tokens that spell the tags of thinking belong to neither text, wherever they occur. Line breaks directly after
the opening tag are dropped from the thoughts. The answer is exactly what follows the closing tag, line breaks included:
that is what vLLM's Qwen3 parser returns, and a client must not see another answer here than there.

Stop strings act on the answer only: the first to be complete ends it, and neither it nor anything behind it is shown.
Text that may be the beginning of a stop string is held back until that is decided.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from typing import Protocol

from thinkserve.server.plan import Plan
from thinkserve.server.wire_types import TokenLogprob, TopLogprob
from thinkserve.strategies.engine import Detokenizer, ModelInfo, Phase, Piece, Role, Tokens
from thinkserve.strategies.text import Stops

SLICE = 64  # tokens with log-probabilities that are turned into text at once: a few milliseconds of the event loop
LOWEST_LOGPROB = -9999.0  # JSON has no minus infinity; vLLM uses the same number


class Texts(Protocol):
    """The part of the Engine that turns tokens into text."""

    def info(self, role: Role = "target") -> ModelInfo:
        """Facts about the model."""
        ...

    def decode(self, tokens: Tokens, role: Role = "target") -> str:
        """Text of the tokens, special tokens left out."""
        ...

    def detokenizer(self, role: Role = "target") -> Detokenizer:
        """A fresh incremental decoder."""
        ...


class TextOut:
    """The text of one response; push every Piece in order, flush at the end.

    `stopped` is the stop string that ended the answer; pieces
    pushed after that yield nothing.
    """

    def __init__(self, engine: Texts, plan: Plan) -> None:
        info = engine.info()
        self._engine = engine
        self._tags = [tag for tag in (info.think_open, info.think_close) if tag]
        self._widest = max((len(tag) for tag in self._tags), default=1)
        self._eos = frozenset(info.eos)
        self._stops = Stops(plan.task.stop)
        self._show = plan.include_reasoning
        self._want_logprobs = plan.task.logprobs is not None
        self._slice = max(1, SLICE // (1 + (plan.task.logprobs or 0)))
        self._phase: Phase | None = None
        self._detokenizer: Detokenizer = engine.detokenizer()
        self._maybe_tag: Tokens = ()
        self._fresh = True  # a paragraph of thoughts begins
        self._held = ""
        self._arrived = self._released = 0
        self._waiting: deque[tuple[int, TokenLogprob]] = deque()
        # Text and bytes by token: alternatives recur, and there are no more of them than the vocabulary has tokens.
        self._spelled: dict[int, tuple[str, list[int] | None]] = {}
        self._texts: dict[Phase, list[str]] = {"thinking": [], "answer": []}
        self.logprobs: list[TokenLogprob] = []
        self.stopped: str | None = None
        self._taken = 0

    @property
    def reasoning(self) -> str:
        """The thoughts so far; empty when the client does not want them."""
        return "".join(self._texts["thinking"])

    @property
    def content(self) -> str:
        """The answer so far."""
        return "".join(self._texts["answer"])

    def slices(self, piece: Piece) -> Iterator[Piece]:
        """What to push of `piece` without a pause: all of it, or tokens with `SLICE` log-probabilities together."""
        if piece.phase != "answer" or not self._want_logprobs or len(piece.tokens) <= self._slice:
            yield piece
            return
        for start in range(0, len(piece.tokens), self._slice):
            part = slice(start, start + self._slice)
            yield replace(piece, tokens=piece.tokens[part], logprobs=piece.logprobs[part], top=piece.top[part])

    def push(self, piece: Piece) -> list[tuple[Phase, str]]:
        """Text that `piece` makes certain: at most one entry per phase, none of them empty."""
        if self.stopped is not None:
            return []
        out = self._turn() if piece.phase != self._phase else []
        self._phase = piece.phase
        if piece.phase == "answer" and self._want_logprobs:
            text = "".join(self._noted(piece))
        else:
            text = self._detokenizer.push(self._without_tags(piece.tokens))
        return [*out, *self._release(piece.phase, text)]

    def anew(self) -> list[tuple[Phase, str]]:
        """The thoughts that come next are another chain's: a paragraph of its own."""
        out = self._turn()
        self._phase, self._fresh = None, True
        return [*out, *self._emit("thinking", "\n\n")]

    def flush(self) -> list[tuple[Phase, str]]:
        """Everything still held back; call it once, after the last piece."""
        if self.stopped is not None:
            return []
        out = self._turn()
        if self._held and self.stopped is None:
            out += self._emit("answer", self._held)
            self._held = ""
        return out

    def take_logprobs(self) -> list[TokenLogprob]:
        """Entries for the answer tokens released since the last call, to go with their text."""
        taken, self._taken = self.logprobs[self._taken :], len(self.logprobs)
        return taken

    def _turn(self) -> list[tuple[Phase, str]]:
        """End of a phase: what its decoder and the tag matcher still hold is text after all."""
        if self._phase is None:
            return []
        text = self._detokenizer.push(self._maybe_tag) + self._detokenizer.flush()
        self._maybe_tag, self._detokenizer = (), self._engine.detokenizer()
        if self._phase == "answer":
            self._arrived += len(text)
        return self._release(self._phase, text)

    def _without_tags(self, tokens: Tokens) -> Tokens:
        if self._widest == 1:
            return tuple(token for token in tokens if (token,) not in self._tags)
        rest, kept, at = self._maybe_tag + tokens, list[int](), 0
        while at < len(rest):
            here = rest[at : at + self._widest]
            whole = next((tag for tag in self._tags if here[: len(tag)] == tag), None)
            if whole is None and any(tag[: len(here)] == here for tag in self._tags):
                break
            kept += () if whole else here[:1]
            at += len(whole) if whole else 1
        self._maybe_tag = rest[at:]
        return tuple(kept)

    def _release(self, phase: Phase, text: str) -> list[tuple[Phase, str]]:
        if phase == "thinking":
            text = text.lstrip("\n") if self._fresh else text
            self._fresh = self._fresh and not text
            return self._emit(phase, text)
        text, self._held = self._held + text, ""
        # The one that is complete first, so that the cut does not depend on how the text was sliced.
        if found := self._stops.find(text):
            _, at, self.stopped = found
            return self._emit(phase, text[:at])
        sure = len(text) - self._ambiguous(text)
        self._held = text[sure:]
        self._stops.drop(sure)
        return self._emit(phase, text[:sure])

    def _ambiguous(self, text: str) -> int:
        """Length of the longest end of `text` that a stop string may begin with."""
        sizes = range(min(self._stops.reach, len(text)), 0, -1)
        return next((size for size in sizes if any(stop.startswith(text[-size:]) for stop in self._stops.strings)), 0)

    def _emit(self, phase: Phase, text: str) -> list[tuple[Phase, str]]:
        if phase == "answer":
            self._released += len(text)
            while self._waiting and self._waiting[0][0] <= self._released:
                self.logprobs.append(self._waiting.popleft()[1])
        if not text or (phase == "thinking" and not self._show):
            return []
        self._texts[phase].append(text)
        return [(phase, text)]

    def _noted(self, piece: Piece) -> Iterator[str]:
        """The text of a piece token by token; each token's entry waits until its text has been released."""
        for index, token in enumerate(piece.tokens):
            text = self._detokenizer.push(self._without_tags((token,)))
            yield text
            self._arrived += len(text)
            if token not in self._eos and (token,) not in self._tags and index < len(piece.logprobs):
                top = [self._entry(*pair) for pair in (piece.top[index] if index < len(piece.top) else ())]
                entry: TokenLogprob = {**self._entry(token, piece.logprobs[index]), "top_logprobs": top}
                self._waiting.append((self._arrived, entry))

    def _entry(self, token: int, logprob: float) -> TopLogprob:
        text, spelling = self._spelled.get(token) or self._spell(token)
        return {"token": text, "logprob": max(logprob, LOWEST_LOGPROB), "bytes": spelling}

    def _spell(self, token: int) -> tuple[str, list[int] | None]:
        text = self._engine.decode((token,))
        # Part of a character has bytes, but not those of what stands for it in a text.
        self._spelled[token] = text, None if "\ufffd" in text else list(text.encode())
        return self._spelled[token]
