"""What steering costs: vLLM as it is, with our worker but no steered row, and with every row steered, in turns.

    python bench/steering_overhead.py [--quick] [--model DIR] [--rows 1 8 32] [--layers N] [--thinking]

Two engines in one process, started several times; only one works at a time. The first two ways must draw the same
tokens.
"""

from __future__ import annotations

import argparse
import hashlib
from array import array
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from random import Random

from bench import overhead
from bench.overhead import Cost, Round, Way, collect, cost, settings_of
from thinkserve.server import vllm_launch
from thinkserve.server.vllm_controls import NOTHING, Entry, Steered
from thinkserve.server.vllm_engine import VllmBackend, create
from thinkserve.steering.vector_file import view
from thinkserve.strategies.engine import Job, Tokens


def vector(hidden: int, layers: int, close: int) -> Steered:
    """A small vector on the first `layers` blocks, as long as thinking lasts if `close` ends it (-1: always)."""
    draw = Random(0)
    numbers = {
        str(layer): view(array("f", (draw.gauss(0, 0.01) for _ in range(hidden))).tobytes()) for layer in range(layers)
    }
    name = hashlib.sha256(b"".join(map(bytes, numbers.values()))).hexdigest()
    return Steered((Entry(name, 1.0, 0, None, close, 0),), {name: numbers})


async def plain(backend: VllmBackend, job: Job) -> Tokens:
    """The tokens of a job."""
    return await written(backend, job, NOTHING)


async def written(backend: VllmBackend, job: Job, steered: Steered) -> Tokens:
    """The tokens of a job that is steered from its last prompt token on."""
    start = len(job.prompt) - 1
    how = replace(steered, entries=tuple(replace(entry, start=start) for entry in steered.entries))
    async with backend.open("bench", None, job, how) as stream:
        return tuple([token async for delta in stream for token in delta.tokens])


@asynccontextmanager
async def engines(options: argparse.Namespace, *, ours_first: bool) -> AsyncIterator[tuple[VllmBackend, VllmBackend]]:
    """Ours and one without our worker; where a process lies in memory makes a difference as well."""
    settings, extend = settings_of(options), vllm_launch.extend
    started: dict[bool, VllmBackend] = {}
    try:
        for own in (ours_first, not ours_first):
            vllm_launch.extend = extend if own else lambda config: setattr(config, "additional_config", {})
            started[own] = await create(settings)
        vllm_launch.extend = extend
        yield started[True], started[False]
    finally:
        vllm_launch.extend = extend
        for backend in started.values():
            await backend.aclose()


async def bench(options: argparse.Namespace) -> list[Cost]:
    """Start both engines, again and again, and measure every number of rows."""
    found: dict[int, dict[str, list[Round]]] = {rows: {} for rows in options.rows}
    for start in range(1 if options.quick else options.starts):
        async with engines(options, ours_first=start % 2 == 0) as (ours, bare):
            close = ours.info.think_close[0] if options.thinking else -1
            small = vector(ours._llm.model_config.get_hidden_size(), options.layers, close)
            steered = partial(written, steered=small)
            ways = {"plain": Way(bare, plain), "idle": Way(ours, plain), "steered": Way(ours, steered, neutral=False)}
            for rows in options.rows:
                for name, each in (await collect(ways, rows, options.tokens, options.rounds)).items():
                    found[rows].setdefault(name, []).extend(each)
    return [cost(found[rows], rows) for rows in options.rows]


def main() -> None:
    """Measure and print."""
    parser = overhead.parser("What steering costs.")
    parser.add_argument("--starts", type=int, default=6, help="how often both engines are started, for `rounds` each")
    parser.set_defaults(rounds=10)
    parser.add_argument("--layers", type=int, default=1, help="blocks that the vector acts on")
    parser.add_argument("--thinking", action="store_true", help="steer as long as thinking lasts")
    overhead.main("steering-overhead", parser.parse_args(), bench, {"idle": 1.005, "steered": 1.02})
