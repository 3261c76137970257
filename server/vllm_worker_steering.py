"""Activation steering inside the worker: vectors are added to the residual stream of single token rows.

The stream after block L is hidden + residual of what the block returns (the sum is formed in the next norm), so adding
to `hidden` is adding to the stream: activation addition (arXiv:2308.10248), for every token its own. All that differs
between steps lies in three kinds of persistent buffers, allocated before anything is compiled or captured: one table of
vectors per layer, and per row up to `columns` pairs of table row and scale. They are filled anew at every step from
request ids and absolute positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.utils.torch_utils import async_tensor_h2d

from thinkserve.kernels.steer import steer
from thinkserve.server.vllm_worker import Step
from thinkserve.server.vllm_worker_blocks import blocks_of, graft_blocks, is_here
from thinkserve.server.vllm_worker_rows import Asked, Entries, Rows, Steady, rows_of

ENTRIES = "steer"
NEVER = 2**62


class Steering:
    """The Part; see `vllm_controls` for the entries: [vector id, scale, start, stop, close token, column]."""

    def __init__(self, sizes: Sizes, layers: Iterable[int], device: torch.device) -> None:
        table = (sizes.slots, sizes.hidden)
        self.tables = {layer: torch.zeros(table, dtype=torch.float32, device=device) for layer in layers}
        self.index = torch.full((sizes.rows, sizes.columns), -1, dtype=torch.int64, device=device)
        self.scale = torch.zeros((sizes.rows, sizes.columns), dtype=torch.float32, device=device)
        # On a CPU the buffers themselves are written.
        self._index = self.index.numpy() if device.type == "cpu" else np.full(self.index.shape, -1, np.int64)
        self._scale = self.scale.numpy() if device.type == "cpu" else np.zeros(self.scale.shape, np.float32)
        self._device = device
        self._slots: dict[str, int] = {}
        self._layers_of: dict[str, frozenset[int]] = {}
        self._free = list(range(sizes.slots))
        self._asked: dict[str, Asked] = {}
        self._closed = _Closed(device)
        # The steered requests of the last step and their entries: in most steps they are the same ones again.
        self._members: tuple[Asked, ...] = ()
        self._entries: Entries | None = None
        self._steady: Steady | None = None
        self._dirty = 0
        self.layers_now: frozenset[int] = frozenset()

    @property
    def busy(self) -> bool:
        """Whether a live request is steered, or rows of the last step are still set."""
        return bool(self._asked) or self._dirty > 0

    def load(self, vector_id: str, layers: Mapping[str, bytes]) -> bool:
        """Put a vector (float32 bytes by layer number) into a table row; False when all rows are taken."""
        if vector_id in self._slots:
            return True
        if not self._free:
            return False
        slot = self._slots[vector_id] = self._free.pop()
        mine = {int(layer): data for layer, data in layers.items() if int(layer) in self.tables}
        self._layers_of[vector_id] = frozenset(mine)
        for layer, table in self.tables.items():
            data = mine.get(layer)
            table[slot] = 0 if data is None else torch.frombuffer(bytearray(data), dtype=torch.float32).to(table)
        return True

    def drop(self, vector_id: str) -> None:
        """Free a vector's table row; no live request may use it."""
        slot = self._slots.pop(vector_id, None)
        if slot is not None:
            del self._layers_of[vector_id]
            self._free.append(slot)

    def admit(self, request_id: str, asked: Mapping[str, Any], params: Any, tokens: list[int]) -> None:
        """Note what a request asks for; the front end has loaded its vectors."""
        self.forget((request_id,))
        # An id that is not there would be the front end's mistake; the request goes on without, the others unharmed.
        entries = [entry for entry in asked.get(ENTRIES) or () if entry[0] in self._slots]
        if not entries:
            return
        ids, scales, starts, stops, closes, columns = zip(*entries, strict=True)
        first = min((start + 1 for start, close in zip(starts, closes, strict=True) if close >= 0), default=None)
        self._asked[request_id] = Asked(
            slot=np.array([self._slots[vector] for vector in ids]),
            scale=np.array(scales, np.float32),
            start=np.array(starts),
            stop=np.array([NEVER if stop is None else stop for stop in stops]),
            column=np.array(columns),
            close=np.array(closes),
            state=None if first is None else self._closed.open(tokens, max(closes), first),
            layers=frozenset[int]().union(*(self._layers_of[vector] for vector in ids)),
        )

    def forget(self, request_ids: Iterable[str]) -> None:
        """Requests have ended."""
        for request_id in request_ids:
            gone = self._asked.pop(request_id, None)
            if gone is not None and gone.state is not None:
                self._closed.release(gone.state)

    def prepare(self, step: Step) -> None:
        """Write the table rows and scales of this step's rows; clear those of the last."""
        live = [(i, asked) for i, name in enumerate(step.request_ids) if (asked := self._asked.get(name)) is not None]
        members = tuple(asked for _, asked in live)
        if members != self._members:
            self._members, self._entries, self._steady = members, Entries.of(members) if members else None, None
        requests = [i for i, _ in live]
        if self._steady is not None and self._steady.goes_on(requests, step):
            return
        rows = None if self._entries is None else rows_of(self._entries, requests, step)
        self._steady = None if self._entries is None else Steady.begun(self._entries, requests, step)
        top = 0 if rows is None or not len(rows.row) else int(rows.row.max()) + 1
        self._index[: self._dirty] = -1
        if rows is not None and top:
            self._index[rows.row, rows.column] = rows.slot
            self._scale[rows.row, rows.column] = rows.scale
        self._upload(max(top, self._dirty))
        self._dirty = top
        self.layers_now = self._entries.layers if self._entries is not None and top else frozenset()
        if rows is not None and (rows.close >= 0).any():
            self._end_with_thinking(rows, step.ids)

    def logits(self, step: Step, logits: Tensor) -> Tensor:
        """Steering leaves logits alone."""
        return logits

    def report(self) -> None:
        """Steering has nothing to say."""

    def clear(self) -> None:
        """A dummy pass follows."""
        self._steady = None
        self._index[: self._dirty] = -1
        self._upload(self._dirty)
        self._dirty = 0
        self.layers_now = frozenset()

    def state(self) -> dict[str, int]:
        """Counts of what is held, for tests and for whoever looks for leaks."""
        return {"requests": len(self._asked), "vectors": len(self._slots), "rows": self._dirty} | self._closed.state()

    def _upload(self, rows: int) -> None:
        if not rows or self._device.type == "cpu":
            return
        # Fresh pinned staging per copy: under async scheduling the copy of the last step may still be under way.
        from vllm.utils.torch_utils import async_tensor_h2d

        async_tensor_h2d(self._index[:rows], out=self.index[:rows])
        async_tensor_h2d(self._scale[:rows], out=self.scale[:rows])

    def _end_with_thinking(self, rows: Rows, ids: Tensor) -> None:
        """Take back the rows at or after their request's end of thinking; on the device, without waiting for it."""
        some = rows.close >= 0
        parts = (rows.row, rows.column, rows.position, rows.close, rows.state)
        row, column, position, close, state = (
            async_tensor_h2d(part[some].astype(np.int64), self._device) for part in parts
        )
        closed = self._closed.update(state, position, ids[row] == close)
        self.index[row, column] = torch.where(position >= closed, -1, self.index[row, column])


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of the buffers: rows of a step, vectors per row, vectors in all, width of the stream."""

    rows: int
    columns: int
    slots: int
    hidden: int


class _Closed:
    """Per request the position of the token that ended its thinking, kept on the device; NEVER while it thinks."""

    def __init__(self, device: torch.device, size: int = 256) -> None:
        self._closed = torch.full((size,), NEVER, dtype=torch.int64, device=device)
        self._first = torch.zeros(size, dtype=torch.int64, device=device)
        self._free = list(range(size))

    def open(self, tokens: list[int], close: int, first: int) -> int:
        """A place for a request whose end of thinking counts from position `first` on; `tokens` are those known."""
        if not self._free:
            size = len(self._closed)
            self._closed = torch.cat((self._closed, torch.full_like(self._closed, NEVER)))
            self._first = torch.cat((self._first, torch.zeros_like(self._first)))
            self._free = list(range(size, 2 * size))
        state = self._free.pop()
        self._first[state] = first
        self._closed[state] = tokens.index(close, first) if close in tokens[first:] else NEVER
        return state

    def release(self, state: int) -> None:
        """The request has ended."""
        self._free.append(state)

    def update(self, state: Tensor, position: Tensor, is_close: Tensor) -> Tensor:
        """Note the end of thinking where it is among these rows; returns the end's position for every row."""
        seen = torch.where(is_close & (position >= self._first[state]), position, NEVER)
        self._closed.scatter_reduce_(0, state, seen, "amin")
        return self._closed[state]

    def state(self) -> dict[str, int]:
        """Places taken."""
        return {"thinking": len(self._closed) - len(self._free)}


def make(worker: Any, model: Any, options: Mapping[str, Any]) -> Steering:
    """The part of a worker, its layers grafted onto the model; `options`: slots, columns, exact, layers ([]: all)."""
    config, runner = worker.vllm_config, worker.model_runner
    blocks = blocks_of(model)
    layers = [layer for layer in options.get("layers") or range(len(blocks)) if is_here(blocks[layer])]
    sizes = Sizes(runner.max_num_tokens, options["columns"], options["slots"], config.model_config.get_hidden_size())
    steering = Steering(sizes, layers, torch.device(runner.device))
    graft_blocks(blocks, steering, config.compilation_config, exact=options.get("exact", False))
    one = torch.zeros(1, sizes.hidden, dtype=config.model_config.dtype, device=steering.index.device)
    for table in list(steering.tables.values())[:1]:
        # The kernel is compiled now, not while requests wait.
        steer(one, table, torch.zeros_like(steering.index[:1]), steering.scale[:1])
    return steering
