"""The part `stats`: what the raw logits say about each step of the requests that asked, as four scalars per token.

Nothing is computed in a step without such a request. A step that ends inside a prompt has logits too, but no token is
drawn from them: its report goes nowhere, because the scheduler makes no output of that step (vllm_scheduler).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from vllm.utils.torch_utils import async_tensor_h2d

from thinkserve.kernels.token_stats import token_stats
from thinkserve.server.vllm_worker import STATS, Step

# Of the kernel's columns: certainty, entropy, margin, close, in the order of TokenStats.
_COLUMNS = slice(2, 6)


class Stats:
    """Implements Part. `vocab` columns of the logits are the vocabulary; `close` is the end of thinking, or -1."""

    def __init__(self, vocab: int, close: int) -> None:
        self._vocab = vocab
        self._close = close
        self._asked: set[str] = set()
        self._ids: list[str] = []
        self._values: Callable[[], list[list[float]]] | None = None

    @property
    def busy(self) -> bool:
        """Whether any live request asked."""
        return bool(self._asked)

    def admit(self, request_id: str, asked: Mapping[str, Any], params: Any, tokens: list[int]) -> None:
        """Take note of a request that asks, or no longer does."""
        if asked.get(STATS):
            self._asked.add(request_id)
        else:
            self._asked.discard(request_id)

    def forget(self, request_ids: Iterable[str]) -> None:
        """Requests have ended."""
        self._asked.difference_update(request_ids)

    def prepare(self, step: Step) -> None:
        """Whatever an earlier step left is not this one's."""
        self._values = None

    def logits(self, step: Step, logits: Tensor) -> Tensor:
        """One pass over the rows of those who asked; logits [requests, vocabulary + padding] stay as they are."""
        rows = [row for row, request_id in enumerate(step.request_ids) if request_id in self._asked]
        if rows:
            some = logits
            if len(rows) < len(step.request_ids):
                # Not a plain copy, which on a GPU would wait for the pass that is under way.
                some = logits[async_tensor_h2d(rows, logits.device, torch.int64)]
            self._ids = [step.request_ids[row] for row in rows]
            self._values = to_host(token_stats(some, self._vocab, self._close)[:, _COLUMNS])
        return logits

    def report(self) -> Callable[[], dict[str, Any]] | None:
        """The four numbers of each request that asked, of the step just done; reading them may wait for the device."""
        ids, values, self._values = self._ids, self._values, None
        if values is None:
            return None
        return lambda: {request_id: {STATS: row} for request_id, row in zip(ids, values(), strict=True)}

    def warm_up(self, dtype: torch.dtype, device: Any) -> None:
        """Load the kernel, or compile it the first time on this machine: requests of others would wait for that."""
        token_stats(torch.zeros(1, self._vocab, dtype=dtype, device=device), self._vocab, self._close)

    def clear(self) -> None:
        """A dummy pass draws nothing."""
        self._values = None


def to_host(values: Tensor) -> Callable[[], list[list[float]]]:
    """Start copying a small matrix to the host; calling the result waits for it, so a device works on meanwhile."""
    if values.device.type != "cuda":
        return values.tolist
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    done.record()

    def wait() -> list[list[float]]:
        done.synchronize()
        rows: list[list[float]] = host.tolist()
        return rows

    return wait


def make(worker: Any, model: Any, options: Mapping[str, Any]) -> Stats:
    """The part for a worker: the vocabulary of its model, and the token that ends thinking if it is a single one."""
    config = worker.vllm_config
    reasoning = config.reasoning_config
    close = list(reasoning.natural_reasoning_end_token_ids or ()) if reasoning is not None else []
    part = Stats(config.model_config.get_vocab_size(), close[0] if len(close) == 1 else -1)
    part.warm_up(config.model_config.dtype, worker.device)
    return part
