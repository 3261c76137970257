"""What ending thinking costs: aborting and going on behind words of ours, against words forced inside the engine.

    PYTHONSAFEPATH=1 .venv/bin/python bench/splice.py [--quick] [--model DIR] [--rows 1 8 32]

Every chain thinks for half of its tokens, is closed, and writes the other half. `forced` has vLLM's own thinking budget
put the closing tag, one token a step, from inside its sampler; `resubmitted` leaves the segment and begins a new one
behind the tag, as strategies do; `plain` is never closed. The tag alone is the case that suits forcing best: every
token more would be a step more.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != here] + [str(here.parent)]

from bench import overhead
from bench.overhead import Cost, Way, measure, settings_of
from thinkserve.server.vllm_engine import VllmBackend, create
from thinkserve.strategies.engine import Job, Tokens
from thinkserve.strategies.streams import whole


async def plain(backend: VllmBackend, job: Job) -> Tokens:
    """The tokens of a job that nobody closes."""
    async with backend.engine("bench").generate(job) as stream:
        return (await whole(stream)).tokens


async def forced(backend: VllmBackend, job: Job) -> Tokens:
    """Closed by the engine. SystemExit if it was not, and in time."""
    tokens = await plain(backend, replace(job, thinking_budget=job.max_tokens // 2))
    close = backend.info.think_close
    if close[0] not in tokens[: job.max_tokens // 2 + 2 * len(close)]:
        raise SystemExit("the engine did not close the thinking")
    return tokens


async def resubmitted(backend: VllmBackend, job: Job) -> Tokens:
    """Closed by a new segment; what is put there counts, as it does where the engine forces it."""
    close = backend.info.think_close
    async with backend.engine("bench").chain(job) as chain:
        async with chain.segment(job.max_tokens) as stream:
            async for _ in stream:
                if len(chain.tokens) >= job.max_tokens // 2:
                    break
        chain.inject(close)
        async with chain.segment(job.max_tokens - len(chain.tokens)) as stream:
            await whole(stream)
        return chain.tokens


async def bench(options: argparse.Namespace) -> list[Cost]:
    """Start the engine and measure every number of rows."""
    backend = await create(settings_of(options))
    try:
        ways = {
            "plain": Way(backend, plain),
            "forced": Way(backend, forced, neutral=False),
            "resubmitted": Way(backend, resubmitted, neutral=False),
        }
        return [await measure(ways, rows, options.tokens, options.rounds) for rows in options.rows]
    finally:
        await backend.aclose()


if __name__ == "__main__":
    overhead.main("splice", overhead.parser("What ending thinking costs.").parse_args(), bench)
