"""What token statistics cost: the same batch without and with them in turns, on one engine.

    python bench/stats_overhead.py [--quick] [--model DIR] [--rows 1 8 32]

Both ways must draw the same tokens.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from bench import overhead
from bench.overhead import Cost, Way, measure, settings_of
from thinkserve.server.vllm_engine import VllmBackend, create
from thinkserve.strategies.engine import Job, Tokens


async def written(backend: VllmBackend, job: Job) -> Tokens:
    """The tokens of a job. SystemExit if statistics do not come as asked."""
    tokens: list[int] = []
    async with backend.engine("bench").generate(job) as stream:
        async for delta in stream:
            tokens += delta.tokens
            if job.stats != bool(delta.stats) and delta.tokens:
                raise SystemExit("statistics do not come as asked")
    return tuple(tokens)


async def bench(options: argparse.Namespace) -> list[Cost]:
    """Start the engine and measure every number of rows."""
    backend = await create(settings_of(options))
    try:
        ways = {
            "plain": Way(backend, written),
            "asked": Way(backend, lambda backend, job: written(backend, replace(job, stats=True))),
        }
        return [await measure(ways, rows, options.tokens, options.rounds) for rows in options.rows]
    finally:
        await backend.aclose()


def main() -> None:
    """Measure and print."""
    options = overhead.parser("What token statistics cost.").parse_args()
    overhead.main("stats-overhead", options, bench, {"asked": 1.02})
