"""The writing half of ScriptedEngine: a job that writes its script token by token, and the byte tokens of text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from thinkserve.strategies.engine import Delta, Finish, Job, ModelInfo, Phase, Stream, Tokens, TokenStats
from thinkserve.strategies.errors import EngineFailed
from thinkserve.strategies.text import Phases

# Byte b of a text is the token b + FIRST_BYTE; the ids below are special.
FIRST_BYTE = 3

# Statistics of the token at a place of a chain's script, by (index of the chain, place).
ScriptedStats = Callable[[int, int], TokenStats]


def plain_stats(index: int, place: int) -> TokenStats:
    """Numbers that differ by chain and place, and never come near the end of thinking."""
    return TokenStats(1.0 + (7 * index + 3 * place) % 11 / 10, entropy=1.0, margin=1.0, close=-5.0)


class Clock(Protocol):
    """What a stream needs of the engine that moves it."""

    async def wait(self, stream: ScriptedStream) -> None:
        """Return when the stream has something to read."""

    def retire(self, stream: ScriptedStream) -> None:
        """Take note that the stream has ended."""


class ScriptedStream:
    """One job as the engine sees it: what it has written, what was read, how it ended."""

    def __init__(
        self, clock: Clock, info: ModelInfo, job: Job, script: Tokens, *, index: int, origin: ScriptedStream | None
    ) -> None:
        self.job = job
        self.index = index
        self.cached = origin.matched(job.prompt) if origin else 0
        self.tokens: list[int] = []
        self.finish: Finish | None = None
        self.error: EngineFailed | None = None
        self.aborted = False
        self.waited = 0
        self.failure: tuple[int, EngineFailed] | None = None
        self.stats: ScriptedStats = plain_stats
        self.script = script
        self._clock, self._info = clock, info
        self._start = self._at = origin.resume(job.prompt) if origin else 0
        self._sources: list[int] = []
        self._forced: list[int] = []
        self._phases = Phases(self._info, _phase(self._info, job.prompt, script))
        self._read = 0
        self._over = False

    @property
    def generated(self) -> int:
        """Tokens written so far, read or not."""
        return len(self.tokens)

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Delta:
        if self._over:
            raise StopAsyncIteration
        self.waited = 0
        await self._clock.wait(self)
        self.waited = 0
        if self.error is not None and self._read == len(self.tokens):
            raise self.error
        return self.unread()

    def unread(self) -> Delta:
        """What has been written and not read, and the end."""
        self._over = self.finish is not None
        places = self._sources[self._read :]
        new, self._read = tuple(self.tokens[self._read :]), len(self.tokens)
        stats = tuple(self.stats(self.index, place - 1) for place in places) if self.job.stats else ()
        return Delta(new, tuple(map(_logprob, new)), self._alternatives(new), self.finish, stats)

    @property
    def pending(self) -> bool:
        """Whether a reader need not wait: the first token, as many unread ones as it asked for, the end, a failure."""
        enough = self._read + self.job.interval if self._read else 1
        return len(self.tokens) >= enough or self.finish is not None or self.error is not None

    def advance(self, count: int = 1) -> None:
        """Write up to `count` tokens, until the job ends or fails."""
        for _ in range(count):
            if self.finish is None and self.error is None:
                self._write()

    def end(self, finish: Finish) -> None:
        """The job has ended: no more tokens."""
        self.finish = finish
        self._clock.retire(self)

    def matched(self, prompt: Tokens) -> int:
        """How many tokens of a longer prompt this job has seen or written."""
        at = len(self.job.prompt)
        for token in self.tokens:
            if at >= len(prompt) or prompt[at] != token:
                break
            at += 1
        return at

    def resume(self, prompt: Tokens) -> int:
        """Where in the script a continuation goes on: after what was written; after thinking, once that is closed."""
        matched = self.matched(prompt)
        written = matched - len(self.job.prompt)
        at = self._sources[written - 1] if written else self._start
        closed = _find(prompt[matched:], self._info.think_close) is not None
        return max(at, self._answer_start()) if closed else at

    def _write(self) -> None:
        if self.failure is not None and len(self.tokens) >= self.failure[0]:
            self.error = self.failure[1]
            self._clock.retire(self)
            return
        token = self._next()
        if token is None or len(self.tokens) >= self.job.max_tokens:
            self.end("length")
            return
        self.tokens.append(token)
        self._sources.append(self._at)
        self._phases.push((token,))
        if token in self._info.eos or token in self.job.stop_tokens or self._at_stop_string():
            self.end("stop")
        elif len(self.tokens) >= self.job.max_tokens:
            self.end("length")

    def _next(self) -> int | None:
        budget = self.job.thinking_budget
        thinking = self._phases.phase == "thinking" and not self._forced
        if thinking and budget is not None and self._phases.length >= budget:
            self._forced = list(self._info.think_close)
            self._at = max(self._at, self._answer_start())
        if self._forced:
            return self._forced.pop(0)
        if self._at >= len(self.script):
            return None
        self._at += 1
        return self.script[self._at - 1]

    def _answer_start(self) -> int:
        close = _find(self.script, self._info.think_close)
        return len(self.script) if close is None else close + len(self._info.think_close)

    def _at_stop_string(self) -> bool:
        return any(text_bytes(self.tokens).endswith(stop.encode()) for stop in self.job.stop)

    def _alternatives(self, tokens: Tokens) -> tuple[tuple[tuple[int, float], ...], ...]:
        count, vocabulary = self.job.logprobs, self._info.vocab_size
        if count is None:
            return ()
        return tuple(tuple(((t + n) % vocabulary, _logprob(t) - n) for n in range(count)) for t in tokens)


def byte_tokens(text: str) -> Tokens:
    """One token per UTF-8 byte."""
    return tuple(FIRST_BYTE + byte for byte in text.encode())


def text_bytes(tokens: Sequence[int]) -> bytes:
    """The bytes that the tokens stand for; special tokens stand for none."""
    return bytes(token - FIRST_BYTE for token in tokens if FIRST_BYTE <= token < FIRST_BYTE + 256)


def _logprob(token: int) -> float:
    return -(token % 7 + 1) / 10


def _find(tokens: Sequence[int], tag: Tokens) -> int | None:
    """Start of the first occurrence of `tag`."""
    width = len(tag)
    return next((at for at in range(len(tokens) - width + 1) if width and tuple(tokens[at : at + width]) == tag), None)


def _phase(info: ModelInfo, prompt: Tokens, script: Tokens) -> Phase | None:
    """Where a job starts: what the prompt's last tag says; without any, what the script's first tag says."""
    opened, closed = _find(prompt[::-1], info.think_open[::-1]), _find(prompt[::-1], info.think_close[::-1])
    if opened is not None or closed is not None:
        return "answer" if opened is None or (closed is not None and closed < opened) else "thinking"
    opened, closed = _find(script, info.think_open), _find(script, info.think_close)
    return "thinking" if closed is not None and (opened is None or closed < opened) else None
