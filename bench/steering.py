"""What steering costs: vLLM as it is, with our worker but no steered row, and with every row steered, in turns.

    python bench/steering_overhead.py [--quick] [--model DIR] [--rows 1 8 32] [--layers N]

Two engines in one process take turns, in an order that changes from round to round; only one works at a time. A round
runs `rows` chains of the same length in all three ways; the first two must draw the same tokens. Beside tokens per
second stands processor time per token (server and engine core), which other work on the machine disturbs less. Prints
the machine, a table and, as the last line, one JSON document.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import time
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from random import Random
from typing import Any

from bench.harness import machine, table, versions
from bench.overhead import Round, processor_time
from bench.stats import Interval, paired_ratio
from thinkserve.server import vllm_launch
from thinkserve.server.settings import Settings
from thinkserve.server.vllm_controls import NOTHING, Entry, Steered
from thinkserve.server.vllm_engine import VllmBackend, create
from thinkserve.strategies.engine import Job, Sampling, Tokens

WAYS = ("plain", "idle", "steered")


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one number of rows: tokens per second of each way, and the cost of a token against vLLM as it is."""

    rows: int
    rounds: int
    speed: dict[str, float]
    wall: dict[str, Interval]
    cpu: dict[str, Interval]


def vector(hidden: int, layers: int) -> Steered:
    """A small vector on the first `layers` blocks."""
    draw = Random(0)
    numbers = {
        str(layer): array("f", (draw.gauss(0, 0.01) for _ in range(hidden))).tobytes() for layer in range(layers)
    }
    name = hashlib.sha256(b"".join(numbers.values())).hexdigest()
    return Steered((Entry(name, 1.0, 0, None, -1, 0),), {name: numbers})


async def write(backend: VllmBackend, job: Job, steered: Steered) -> Tokens:
    """The tokens of a job."""
    async with backend.open("bench", None, job, steered) as stream:
        return tuple([token async for delta in stream for token in delta.tokens])


async def once(backend: VllmBackend, rows: int, most: int, seed: int, steered: Steered) -> Round:
    """One way of one round."""
    prompt = (*backend.engine("p").encode("317*46="), *backend.info.think_open)
    start = len(prompt) - 1
    how = replace(steered, entries=tuple(replace(entry, start=start) for entry in steered.entries))
    no_end = Sampling(temperature=0.7, logit_bias=tuple((token, -100.0) for token in backend.info.eos))
    jobs = [Job(prompt, most, no_end, seed=seed * 1000 + row) for row in range(rows)]
    cpu, wall = processor_time(backend), time.perf_counter()
    tokens = await asyncio.gather(*(write(backend, job, how) for job in jobs))
    return Round(time.perf_counter() - wall, processor_time(backend) - cpu, tuple(tokens))


async def measure(bare: VllmBackend, ours: VllmBackend, rows: int, options: argparse.Namespace) -> Cost:
    """All ways in turns; the first round warms up and does not count."""
    hidden = ours._llm.model_config.get_hidden_size()
    ways = {"plain": (bare, NOTHING), "idle": (ours, NOTHING), "steered": (ours, vector(hidden, options.layers))}
    found: dict[str, list[Round]] = {way: [] for way in WAYS}
    for seed in range(options.rounds + 1):
        for way in WAYS[seed % 3 :] + WAYS[: seed % 3]:
            backend, steered = ways[way]
            found[way].append(await once(backend, rows, options.tokens, seed, steered))
        if found["plain"][-1].tokens != found["idle"][-1].tokens:
            raise SystemExit(f"{rows} rows: our worker changed what was drawn")
    counted = {way: rounds[1:] for way, rounds in found.items()}

    def ratio(way: str, name: str) -> Interval:
        each, base = ([getattr(one, name) / one.count for one in counted[key]] for key in (way, "plain"))
        return paired_ratio(each, base)

    speed = {way: sum(one.count for one in of) / sum(one.wall for one in of) for way, of in counted.items()}
    return Cost(
        rows,
        options.rounds,
        speed,
        {way: ratio(way, "wall") for way in WAYS[1:]},
        {way: ratio(way, "cpu") for way in WAYS[1:]},
    )


async def bench(options: argparse.Namespace) -> list[Cost]:
    """Start both engines and measure every number of rows."""
    settings = Settings(**({"model": options.model} if options.model else {}), kv_cache_gib=0.25)
    ours, extend = await create(settings), vllm_launch.extend
    try:
        vllm_launch.extend = lambda config: setattr(config, "additional_config", {})
        bare = await create(settings)
        vllm_launch.extend = extend
        try:
            return [await measure(bare, ours, rows, options) for rows in options.rows]
        finally:
            await bare.aclose()
    finally:
        await ours.aclose()


def report(costs: Sequence[Cost]) -> str:
    """The table."""
    header = ("rows", "tok/s plain", "idle", "steered", "idle: wall", "cpu", "steered: wall", "cpu")
    lines = [
        (
            str(cost.rows),
            *(f"{cost.speed[way]:.0f}" for way in WAYS),
            *(f"x {of[way]:.3f}" for way in WAYS[1:] for of in (cost.wall, cost.cpu)),
        )
        for cost in costs
    ]
    return table(header, lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="What steering costs.")
    parser.add_argument("--model", help="model folder; default: the embedded one")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--layers", type=int, default=1, help="blocks that the vector acts on")
    parser.add_argument("--quick", action="store_true", help="3 rounds of 48 tokens: does it work here?")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.tokens = 3, 48
    costs = asyncio.run(bench(options))
    found: dict[str, Any] = {"date": datetime.now(UTC).date().isoformat(), "machine": machine(), "versions": versions()}
    settings = {"model": options.model, "tokens": options.tokens, "layers": options.layers}
    print(found["machine"])
    print(report(costs))
    print(json.dumps(found | settings | {"costs": list(map(asdict, costs))}))
