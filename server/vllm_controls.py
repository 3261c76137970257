"""From a job's controls to what the worker is told: names become content, positions become absolute.

An entry of steering is [vector id, scale, start, stop, close token, column]: rows at positions start to stop
(exclusive, None: no end) are steered, but none from the first `close` token after `start` on (-1: no such end). Entries
of one column never overlap; the columns of a row are added in order.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from thinkserve.server.vectors import SteeringVector, Vectors
from thinkserve.strategies.chain import ResubmittedChain
from thinkserve.strategies.controls import Guide, Steer
from thinkserve.strategies.engine import Job, ModelInfo, Stream, Tokens
from thinkserve.strategies.errors import BadOptions, Unsupported
from thinkserve.strategies.streams import Recorded
from thinkserve.strategies.text import last_tags

# How many vectors may act on one token.
COLUMNS = 4

# Views of a vector's float32 values by layer. On some of its layers only it is another vector, with an id of its own.
Payload = Mapping[str, "memoryview[float]"]


@dataclass(frozen=True, slots=True)
class Entry:
    """Where one vector acts; positions are absolute."""

    vector: str
    scale: float
    start: int
    stop: int | None
    close: int
    column: int

    def sent(self) -> list[object]:
        """As the worker reads it."""
        return [self.vector, self.scale, self.start, self.stop, self.close, self.column]


@dataclass(frozen=True, slots=True)
class Steered:
    """The steering of one job: entries in order of position, and the vectors that the worker must hold."""

    entries: tuple[Entry, ...] = ()
    vectors: Mapping[str, Payload] = field(default_factory=dict[str, Payload])

    def args(self) -> dict[str, Any]:
        """The worker's part of SamplingParams.extra_args."""
        return {"steer": [entry.sent() for entry in self.entries]} if self.entries else {}


NOTHING = Steered()


def steering(job: Job, info: ModelInfo, vectors: Vectors | None, past: Steered = NOTHING) -> Steered:
    """The steering of a job that goes on from `past`. Raises BadOptions, Unsupported."""
    if unknown := [control for control in job.controls if not isinstance(control, Steer | Guide)]:
        raise Unsupported(f"Unsupported control: {type(unknown[0]).__name__}")
    asked = [control for control in job.controls if isinstance(control, Steer) and control.scale != 0]
    if not asked and not past.entries:
        return NOTHING
    if vectors is None:
        raise Unsupported("This server does not steer activations.", "steer")
    if len(asked) > COLUMNS:
        raise BadOptions(f"At most {COLUMNS} steering vectors act on one sequence.", "steer")
    first = len(job.prompt) - job.written
    start = first - 1
    entries, payloads = list(_until(past, start)), dict(past.vectors)
    for column, control in enumerate(asked):
        name, payload = _vector(control, vectors)
        close = -1 if control.positions == "generated" else _close(job.prompt[job.since : first], info)
        if close is None:
            continue
        payloads[name] = payload
        stop = job.prompt.index(close, first) if close in job.prompt[first:] else None
        entries.append(Entry(name, _finite(control.scale), start, stop, close, column))
    # The worker knows one end of thinking per request, that of the job; what is past has ended where it ended.
    settled = (entry if entry.stop is None else replace(entry, close=-1) for entry in _joined(entries))
    return Steered(tuple(settled), payloads)


def _finite(scale: float) -> float:
    if not math.isfinite(scale):
        raise BadOptions("The scale of a steering vector must be a finite number.", "steer")
    return float(scale)


def _vector(control: Steer, vectors: Vectors) -> tuple[str, Payload]:
    vector = vectors.get(control.vector)
    if vector is None:
        known = ", ".join(sorted(vectors)) or "none"
        raise BadOptions(f"No steering vector {control.vector!r}; there are: {known}.", "steer")
    layers = tuple(sorted(set(control.layers)))
    if missing := [layer for layer in layers if layer not in vector.layers]:
        raise BadOptions(f"The vector {control.vector!r} has no layer {missing[0]}.", "steer")
    name = vector.id if not layers else f"{vector.id}/{','.join(map(str, layers))}"
    return name, _payload(vector, layers)


def _payload(vector: SteeringVector, layers: tuple[int, ...]) -> Payload:
    return {str(layer): vector.layers[layer] for layer in layers or vector.layers}


def _close(prompt: Tokens, info: ModelInfo) -> int | None:
    """The token that ends thinking; None when the prompt has ended it already. Raises Unsupported."""
    if len(info.think_close) != 1:
        raise Unsupported("Steering while thinking needs a model that ends its thinking with one token.", "steer")
    opened, closed = last_tags(info, prompt)
    return info.think_close[0] if closed < 0 or opened > closed else None


def _until(past: Steered, end: int) -> list[Entry]:
    """What was steered before position `end`."""
    stops = [(entry, end if entry.stop is None else min(entry.stop, end)) for entry in past.entries]
    return [replace(entry, stop=stop) for entry, stop in stops if entry.start < stop]


def _joined(entries: list[Entry]) -> list[Entry]:
    """Entries that go on where an equal one ended become one: the prefix cache then knows the tokens again."""
    joined: list[Entry] = []
    for entry in entries:
        same = (entry.vector, entry.scale, entry.close, entry.column)
        last = next((old for old in reversed(joined) if (old.vector, old.scale, old.close, old.column) == same), None)
        if last is not None and last.stop == entry.start:
            joined[joined.index(last)] = replace(last, stop=entry.stop)
        else:
            joined.append(entry)
    return joined


Open = Callable[[Job, Steered], AbstractAsyncContextManager[Stream]]


class Continued(ResubmittedChain):
    """A chain by resubmission: tokens that were steered when they were generated stay so when resubmitted.

    Tokens of ours were not generated, whatever had stood in their place.
    """

    def __init__(self, start: Open, steer: Callable[[Job, Steered], Steered], job: Job, info: ModelInfo) -> None:
        super().__init__(self._resubmitted, job, info)
        self._start = start
        self._steer = steer
        self._past = NOTHING

    def drop(self, count: int) -> None:
        """Forget the last tokens, and how they were steered: how many were read must not matter."""
        super().drop(count)
        kept = _until(self._past, len(self._job.prompt) + len(self._tokens))
        self._past = replace(self._past, entries=tuple(kept))

    @asynccontextmanager
    async def _resubmitted(self, job: Job) -> AsyncIterator[Stream]:
        """One segment; the next one knows the steering of the tokens that were read from it."""
        now = self._steer(job, self._past)
        async with self._start(job, now) as stream:
            read: list[int] = []
            try:
                yield Recorded(stream, read)
            finally:
                end = len(job.prompt) + len(read)
                self._past = replace(now, entries=tuple(_ended(now, end, job.prompt + tuple(read))))


def _ended(now: Steered, end: int, tokens: Tokens) -> list[Entry]:
    """The entries of a segment whose tokens end at position `end`, thinking that ended within included."""
    ended: list[Entry] = []
    for entry in now.entries:
        stop = end if entry.stop is None else entry.stop
        if entry.close >= 0 and entry.close in tokens[entry.start + 1 : stop]:
            stop = tokens.index(entry.close, entry.start + 1)
        ended.append(replace(entry, stop=stop))
    return ended
