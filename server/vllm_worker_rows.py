"""Which rows of a step are steered, and by what: from requests' entries and positions, in plain numpy."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thinkserve.server.vllm_worker import Ints, Step


@dataclass(frozen=True, slots=True, eq=False)
class Wanted:
    """Entries, an array element each: which vector, how much, at which positions."""

    slot: Ints
    scale: NDArray[np.float32]
    start: Ints
    stop: Ints
    column: Ints
    close: Ints


@dataclass(frozen=True, slots=True, eq=False)
class Asked(Wanted):
    """What one request asks for."""

    state: int | None
    layers: frozenset[int]


@dataclass(frozen=True, slots=True, eq=False)
class Entries(Wanted):
    """The entries of several requests one after another; `many` of each request."""

    many: Ints
    state: Ints
    layers: frozenset[int]

    @staticmethod
    def of(asked: tuple[Asked, ...]) -> Entries:
        """Those of these requests, in their order."""
        many = np.array([len(each.slot) for each in asked])
        names = [field.name for field in fields(Wanted)]
        arrays: dict[str, Any] = {name: np.concatenate([getattr(each, name) for each in asked]) for name in names}
        state = np.repeat([-1 if each.state is None else each.state for each in asked], many)
        layers = frozenset[int]().union(*(each.layers for each in asked))
        return Entries(many=many, state=state, layers=layers, **arrays)


@dataclass(frozen=True, slots=True)
class Rows:
    """The steered rows of a step, an array element per (row, column)."""

    row: Ints
    column: Ints
    slot: Ints
    scale: NDArray[np.float32]
    position: Ints
    close: Ints
    state: Ints


@dataclass(frozen=True, slots=True)
class Steady:
    """Requests that each write one token a step, steered by all of their entries: the next step is as this one was."""

    entries: Entries
    requests: list[int]
    rows: list[int]
    owner: Ints

    @staticmethod
    def begun(entries: Entries, requests: list[int], step: Step) -> Steady | None:
        """Of these requests in this step; None where the next one may be another."""
        if (entries.close >= 0).any():
            return None
        rows, owner = step.first_row[requests].tolist(), np.repeat(requests, entries.many)
        steady = Steady(entries, requests, rows, owner)
        return steady if steady.goes_on(requests, step) else None

    def goes_on(self, requests: list[int], step: Step) -> bool:
        """Whether a step of the same requests is such a step again, in the same rows."""
        if requests != self.requests or step.first_row[requests].tolist() != self.rows:
            return False
        position = step.position[self.owner]
        inside = (self.entries.start <= position) & (position < self.entries.stop)
        return bool((step.count[requests] == 1).all() and inside.all())


def rows_of(entries: Entries, requests: list[int], step: Step) -> Rows:
    """All steered rows of a step; `requests` are the indices in the step of those that the entries belong to."""
    owner = np.repeat(requests, entries.many)
    position, count = step.position[owner].astype(np.int64), step.count[owner].astype(np.int64)
    low = np.clip(entries.start - position, 0, count)
    many = np.maximum(np.clip(entries.stop - position, 0, count) - low, 0)
    # One element per row: the entry it belongs to, and which of the entry's rows it is.
    entry = np.repeat(np.arange(len(owner)), many)
    nth = np.arange(len(entry)) - np.repeat(np.cumsum(many) - many, many) + low[entry]
    return Rows(
        row=step.first_row[owner][entry] + nth,
        column=entries.column[entry],
        slot=entries.slot[entry],
        scale=entries.scale[entry],
        position=position[entry] + nth,
        close=entries.close[entry],
        state=entries.state[entry],
    )
