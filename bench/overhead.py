"""What something inside the engine costs: the same batch with and without it in turns, in one process.

A round runs `rows` seeded chains of one length in every way, the order rotating from round to round, one way at a time.
Ways that must not change what is drawn are held to it. Beside tokens per second stands processor time per token (server
and engine cores), which other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.harness import ROOT, keep, machine, table, versions
from bench.inprocess import TARGETS, verdict
from bench.stats import Interval, paired_ratio
from thinkserve.server.settings import Settings
from thinkserve.server.vllm_engine import VllmBackend
from thinkserve.strategies.engine import Job, Sampling, Tokens


@dataclass(frozen=True, slots=True)
class Way:
    """One way to run a job on a backend. A `neutral` way draws the same tokens as the first of its table."""

    backend: VllmBackend
    write: Callable[[VllmBackend, Job], Awaitable[Tokens]]
    neutral: bool = True


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
    """Of one number of rows: tokens per second of each way, and what a token costs against the first of them.

    `wall` and `cpu` compare means over rounds; `best` the processor time of the cheapest round of each way.
    """

    rows: int
    rounds: int
    speed: dict[str, float]
    wall: dict[str, Interval]
    cpu: dict[str, Interval]
    best: dict[str, float]


def processor_time(backend: VllmBackend) -> float:
    """Seconds that this process and the engine core have computed so far."""
    manager = backend._llm.engine_core.resources.engine_manager  # vLLM's own handle of its processes
    tasks = [path for process in manager.processes for path in Path(f"/proc/{process.pid}/task").glob("*/schedstat")]
    return time.process_time() + sum(int(path.read_text().split()[0]) for path in tasks) / 1e9


async def once(way: Way, rows: int, most: int, seed: int) -> Round:
    """One way of one round."""
    backend = way.backend
    prompt = (*backend.engine("p").encode("317*46="), *backend.info.think_open)
    no_end = Sampling(temperature=0.7, logit_bias=tuple((token, -100.0) for token in backend.info.eos))
    jobs = [Job(prompt, most, no_end, seed=seed * 1000 + row) for row in range(rows)]
    cpu, wall = processor_time(backend), time.perf_counter()
    tokens = await asyncio.gather(*(way.write(backend, job) for job in jobs))
    return Round(time.perf_counter() - wall, processor_time(backend) - cpu, tuple(tokens))


async def measure(ways: Mapping[str, Way], rows: int, most: int, rounds: int) -> Cost:
    """All ways in turns. SystemExit if a neutral way is not."""
    return cost(await collect(ways, rows, most, rounds), rows)


async def collect(ways: Mapping[str, Way], rows: int, most: int, rounds: int) -> dict[str, list[Round]]:
    """The rounds of all ways, in turns; the first of each warms up and does not count. SystemExit as above."""
    names = list(ways)
    found: dict[str, list[Round]] = {name: [] for name in names}
    for seed in range(rounds + 1):
        at = seed % len(names)
        for name in names[at:] + names[:at]:
            found[name].append(await once(ways[name], rows, most, seed))
        for name, way in ways.items():
            if way.neutral and found[name][-1].tokens != found[names[0]][-1].tokens:
                raise SystemExit(f"{rows} rows: {name} changed what was drawn")
    return {name: of[1:] for name, of in found.items()}


def cost(found: Mapping[str, Sequence[Round]], rows: int) -> Cost:
    """What every way costs against the first."""
    base, *others = found

    def each(name: str, what: str) -> list[float]:
        return [getattr(one, what) / one.count for one in found[name]]

    return Cost(
        rows,
        len(found[base]),
        {name: sum(one.count for one in of) / sum(one.wall for one in of) for name, of in found.items()},
        {name: paired_ratio(each(name, "wall"), each(base, "wall")) for name in others},
        {name: paired_ratio(each(name, "cpu"), each(base, "cpu")) for name in others},
        {name: min(each(name, "cpu")) / min(each(base, "cpu")) for name in others},
    )


def expectations(costs: Sequence[Cost], most: Mapping[str, float]) -> str:
    """The table of what was expected: the wall time of each way of `most`, over that of the first."""
    lines: list[list[str]] = []
    for way, limit in most.items():
        for cost in costs:
            wall = cost.wall[way]
            met = verdict(wall.value <= limit)
            lines.append([f"{way}, {cost.rows} rows: wall time", f"<= {limit}", f"{wall:.3f}", met])
    return table(TARGETS, lines)


def report(costs: Sequence[Cost]) -> str:
    """The table."""
    ways = list(costs[0].speed)
    per_way = [f"{way}: {what}" for way in ways[1:] for what in ("wall", "cpu", "best cpu")]
    lines = [
        [str(cost.rows), *(f"{cost.speed[way]:.0f}" for way in ways)]
        + [text for way in ways[1:] for text in (f"x {cost.wall[way]:.3f}", f"x {cost.cpu[way]:.3f}",
                                                 f"x {cost.best[way]:.3f}")]
        for cost in costs
    ]  # fmt: skip
    return table(["rows", *(f"{way}: tok/s" for way in ways), *per_way], lines)


def parser(description: str) -> argparse.ArgumentParser:
    """The options that every such measurement has."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--model", help="model folder; default: the embedded one")
    made.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    made.add_argument("--rounds", type=int, default=20)
    made.add_argument("--tokens", type=int, default=128)
    made.add_argument("--quick", action="store_true", help="3 rounds of 48 tokens, nothing kept: does it work here?")
    return made


def settings_of(options: argparse.Namespace) -> Settings:
    """Of an engine under test."""
    return Settings(**({"model": options.model} if options.model else {}), kv_cache_gib=0.25)


def main(
    name: str,
    options: argparse.Namespace,
    bench: Callable[[argparse.Namespace], Awaitable[list[Cost]]],
    most: Mapping[str, float] = {},
) -> None:
    """Measure, print the machine, tables and one JSON line, and keep these in `results/`. `most`: see expectations."""
    if options.quick:
        options.rounds, options.tokens = 3, 48

    async def run() -> list[Cost]:
        return await bench(options)

    costs = asyncio.run(run())
    tables = [report(costs), *([expectations(costs, most)] if most else [])]
    date, shown = datetime.now(UTC).date().isoformat(), "\n\n".join(tables)
    found: dict[str, Any] = {"date": date, "machine": machine(), "versions": versions(), "options": vars(options)}
    data = found | {"costs": list(map(asdict, costs))}
    print(found["machine"], shown, json.dumps(data), sep="\n")
    if not options.quick:
        keep(ROOT / "bench" / "results", f"{date}-{name}", f"machine: {found['machine']}\n\n{shown}\n", data)
