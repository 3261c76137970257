"""Seeded requests whose prompt is read in pieces: their random numbers wait until a token is drawn.

vLLM's model runner V1 draws for every row, also for those that are still inside their prompt, drops those tokens and
turns the rows' generators back. A generator on the CPU cannot be turned back: the engine would end with "CPU Generator
does not use offset". So the generators are taken away while such rows are drawn for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np


@contextmanager
def generators_kept(runner: Any) -> Iterator[None]:
    """While tokens are sampled, rows whose token will be dropped have no generator of their own."""
    batch = runner.input_batch
    dropped = np.flatnonzero(runner.discard_request_mask.np[: batch.num_reqs]).tolist() if batch.generators else []
    kept = {row: batch.generators.pop(row) for row in dropped if row in batch.generators}
    try:
        yield
    finally:
        batch.generators.update(kept)
