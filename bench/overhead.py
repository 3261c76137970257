"""What token statistics cost: the same batch with and without them in turns, in one process on one engine.

    python bench/stats_overhead.py [--quick] [--model DIR] [--rows 1 8 32]

A round runs `rows` seeded chains to their ends in both ways, the order swapped from round to round; both ways must draw
the same tokens. Beside tokens per second stands processor time per token (server and engine core), which other work on
the machine disturbs less. Prints the machine, a table and, as the last line, one JSON document.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.harness import machine, table, versions
from bench.stats import Interval, paired_ratio
from thinkserve.server.settings import Settings
from thinkserve.server.vllm_engine import VllmBackend, create
from thinkserve.strategies.engine import Job, Sampling, Tokens


@dataclass(frozen=True, slots=True)
class Round:
    """One way of one round: seconds of wall clock and of processor time, and all tokens drawn."""

    wall: float
    cpu: float
    tokens: tuple[Tokens, ...]

    @property
    def count(self) -> int:
        """Tokens of all chains."""
        return sum(map(len, self.tokens))


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one number of rows: tokens per second without and with statistics, and how much more each token costs.

    `wall` and `cpu` compare means over rounds; `best` the processor time of the cheapest round of each way.
    """

    rows: int
    rounds: int
    plain: float
    asked: float
    wall: Interval
    cpu: Interval
    best: float


def processor_time(backend: VllmBackend) -> float:
    """Seconds that this process and the engine core have computed so far."""
    manager = backend._llm.engine_core.resources.engine_manager  # vLLM's own handle of its processes
    tasks = [path for process in manager.processes for path in Path(f"/proc/{process.pid}/task").glob("*/schedstat")]
    return time.process_time() + sum(int(path.read_text().split()[0]) for path in tasks) / 1e9


async def write(backend: VllmBackend, job: Job) -> Tokens:
    """The tokens of a job."""
    tokens: list[int] = []
    async with backend.engine("bench").generate(job) as stream:
        async for delta in stream:
            tokens += delta.tokens
            if job.stats != bool(delta.stats) and delta.tokens:
                raise SystemExit("statistics do not come as asked")
    return tuple(tokens)


async def once(backend: VllmBackend, rows: int, most: int, seed: int, *, stats: bool) -> Round:
    """One way of one round."""
    prompt = (*backend.engine("p").encode("317*46="), *backend.info.think_open)
    no_end = Sampling(temperature=0.7, logit_bias=tuple((token, -100.0) for token in backend.info.eos))
    jobs = [Job(prompt, most, no_end, seed=seed * 1000 + row, stats=stats) for row in range(rows)]
    cpu, wall = processor_time(backend), time.perf_counter()
    tokens = await asyncio.gather(*(write(backend, job) for job in jobs))
    return Round(time.perf_counter() - wall, processor_time(backend) - cpu, tuple(tokens))


async def measure(backend: VllmBackend, rows: int, most: int, rounds: int) -> Cost:
    """Both ways in turns; the first round of each warms up and does not count."""
    plain: list[Round] = []
    asked: list[Round] = []
    for seed in range(rounds + 1):
        for stats in (seed % 2 == 0, seed % 2 == 1):
            (asked if stats else plain).append(await once(backend, rows, most, seed, stats=stats))
        if plain[-1].tokens != asked[-1].tokens:
            raise SystemExit(f"{rows} rows: statistics changed what was drawn")
    del plain[0], asked[0]

    def each(of: Sequence[Round], name: str) -> list[float]:
        return [getattr(one, name) / one.count for one in of]

    wall = paired_ratio(each(asked, "wall"), each(plain, "wall"))
    cpu = paired_ratio(each(asked, "cpu"), each(plain, "cpu"))
    best = min(each(asked, "cpu")) / min(each(plain, "cpu"))
    return Cost(rows, rounds, _speed(plain), _speed(asked), wall, cpu, best)


def _speed(of: Sequence[Round]) -> float:
    return sum(one.count for one in of) / sum(one.wall for one in of)


async def bench(options: argparse.Namespace) -> list[Cost]:
    """Start the engine and measure every number of rows."""
    backend = await create(Settings(**({"model": options.model} if options.model else {}), kv_cache_gib=0.25))
    try:
        return [await measure(backend, rows, options.tokens, options.rounds) for rows in options.rows]
    finally:
        await backend.aclose()


def report(costs: Sequence[Cost]) -> str:
    """The table."""
    header = ("rows", "tok/s without", "tok/s with", "wall per token", "processor time per token", "its best round")
    lines = [
        (f"{each.rows}", f"{each.plain:.0f}", f"{each.asked:.0f}", f"x {each.wall:.3f}", f"x {each.cpu:.3f}")
        for each in costs
    ]
    return table(header, [(*line, f"x {each.best:.3f}") for line, each in zip(lines, costs, strict=True)])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="What token statistics cost.")
    parser.add_argument("--model", help="model folder; default: the embedded one")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--quick", action="store_true", help="3 rounds of 48 tokens: does it work here?")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.tokens = 3, 48
    costs = asyncio.run(bench(options))
    found: dict[str, Any] = {"date": datetime.now(UTC).date().isoformat(), "machine": machine(), "versions": versions()}
    print(found["machine"])
    print(report(costs))
    print(json.dumps(found | {"model": options.model, "tokens": options.tokens, "costs": list(map(asdict, costs))}))
