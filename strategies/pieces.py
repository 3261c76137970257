"""From an engine's deltas to committed output: every token labelled thinking or answer, in order, once."""

from __future__ import annotations

from math import nan

from thinkserve.strategies.engine import Delta, Emit, Engine, ModelInfo, Phase, Piece, Task, Tokens, TokenStats
from thinkserve.strategies.text import Phases, Stops


class Transcript:
    """All that one chain has written, and how much of it has been taken as pieces."""

    def __init__(self, info: ModelInfo, phase: Phase | None) -> None:
        self.phases = Phases(info, phase)
        self.tokens: list[int] = []
        self._logprobs: list[float] = []
        self._top: list[tuple[tuple[int, float], ...]] = []
        # (phase, end): few, because neighbours of one phase are one run.
        self._runs: list[tuple[Phase, int]] = []
        self._taken = 0

    @property
    def answer(self) -> Tokens:
        """Tokens of the answer so far."""
        spans = zip([0, *(end for _, end in self._runs)], self._runs, strict=False)
        return tuple(token for start, (phase, end) in spans if phase == "answer" for token in self.tokens[start:end])

    def push(self, delta: Delta) -> None:
        """Append what the engine wrote; the last delta of a stream settles tokens that were held as half a tag."""
        self.tokens.extend(delta.tokens)
        self._logprobs.extend(delta.logprobs)
        self._top.extend(delta.top)
        for phase, count in self.phases.push(delta.tokens):
            self._label(phase, count)
        if delta.finish is not None and self.phases.held:
            self._label("answer", self.phases.held)

    def take(self) -> list[Piece]:
        """What was labelled since the last call, in as few pieces as there are changes of phase."""
        pieces: list[Piece] = []
        for phase, end in self._runs:
            if end > self._taken:
                span = slice(self._taken, end)
                tokens = tuple(self.tokens[span])
                pieces.append(Piece(phase, tokens, tuple(self._logprobs[span]), tuple(self._top[span])))
                self._taken = end
        return pieces

    def _label(self, phase: Phase, count: int) -> None:
        end = (self._runs[-1][1] if self._runs else 0) + count
        if self._runs and self._runs[-1][0] == phase:
            self._runs[-1] = (phase, end)
        else:
            self._runs.append((phase, end))


async def write(delta: Delta, transcript: Transcript, emit: Emit) -> None:
    """Append a delta to a transcript and emit what it settles."""
    transcript.push(delta)
    for piece in transcript.take():
        await emit(piece)


def stopped(transcript: Transcript, task: Task, engine: Engine) -> bool:
    """Whether the answer holds a stop string of the caller's, so that nothing follows."""
    return bool(task.stop) and Stops(task.stop).find(engine.decode(transcript.answer)) is not None


UNKNOWN = TokenStats(nan, nan, nan, nan)


def injected(tokens: Tokens, logprobs: int | None, *, stats: bool = False) -> Delta:
    """Tokens that nobody drew: certain, so of log-probability 0, without alternatives; `logprobs` as in the Job.

    With `stats` those of each are not known, for there was no step of the model that could have them.
    """
    count = len(tokens)
    unknown = (UNKNOWN,) * count if stats else ()
    return Delta(tokens, (0.0,) * count, ((),) * count if logprobs else (), stats=unknown)
