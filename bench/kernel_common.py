"""What the kernel benches share: right before fast, paired timing, the bandwidth of a copy, a table, a line of JSON.

The ways of a case are timed in turns, so that whatever else the machine does meets all of them; a figure is the best of
several rounds on a CPU and the median of several launches, the L2 cache emptied before each, on a GPU. Bytes moved are
those a perfect kernel would move; the copy they are compared with moves as many.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import torch
from torch import Tensor

from bench.harness import ROOT, keep, machine, slug, table, versions

Way = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Budget:
    """How long to measure on a CPU: seconds of one way's round, seconds and rounds at most of a case."""

    round: float
    case: float
    rounds: int


# Rounds shorter than a slice of the scheduler: on a busy machine some of them are undisturbed.
FULL, QUICK = Budget(0.002, 6.0, 300), Budget(0.002, 1.0, 40)


@dataclass(frozen=True, slots=True)
class Case:
    """One size of a kernel: its ways by name (the first is ours), how wrong ours is, and what it must move.

    `error` is the RMS ratio of ours against the float64 reference, `allowed` what may remain; `moved` in bytes.
    """

    size: str
    ways: Mapping[str, Way]
    error: float
    allowed: float
    moved: int


@dataclass(frozen=True, slots=True)
class Result:
    """What was measured of a case: seconds by way, and ours as a share of the bandwidth of a copy."""

    size: str
    error: float
    seconds: dict[str, float]
    bandwidth: float


def options(description: str) -> argparse.Namespace:
    """The command line of a kernel bench: `--quick` proves that it works and measures nothing worth quoting."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="fewer sizes, less time")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch on a CPU (default: 1, as our engine runs)")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    return chosen


def device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def rms_ratio(actual: Tensor, expected: Tensor) -> float:
    """Root mean square of the error over that of what was expected, both in float64."""
    wanted = expected.to(torch.float64)
    return ((actual.to(torch.float64) - wanted).square().mean() / wanted.square().mean()).sqrt().item()


def compiled(call: Callable[..., Any]) -> Callable[..., Any]:
    """`call` under torch.compile as vLLM uses it: one graph for all sizes; the first call compiles."""
    return torch.compile(call, dynamic=True, fullgraph=True)


def bench(name: str, cases: Iterable[Case], budget: Budget) -> None:
    """Check and measure every case; print the table and, as the last line, the same as JSON; keep both if not quick.

    Exits with status 1 at the first case that is wrong: nothing is ever said about its speed.
    """
    results = [_measure(case, budget) for case in cases]
    threads = torch.get_num_threads()
    date = datetime.now(UTC).date().isoformat()
    about = {"date": date, "kernel": name, "device": _device_name(), "machine": machine(), "threads": threads}
    head = f"{name}: {date}; {about['device']}; {about['machine']}; {threads} threads; torch {torch.__version__}"
    data = about | {"versions": versions(), "results": [asdict(result) for result in results]}
    shown = _table(results)
    print(head, shown, json.dumps(data), sep="\n")
    if budget is not QUICK:
        keep(ROOT / "bench" / "results", f"{date}-kernel-{name}-{slug(_device_name())}", f"{head}\n\n{shown}\n", data)


def _measure(case: Case, budget: Budget) -> Result:
    if not case.error <= case.allowed:
        sys.exit(f"{case.size}: wrong: RMS ratio {case.error:.2e}, allowed {case.allowed:.0e}")
    source = torch.zeros(max(1, case.moved // 2), dtype=torch.uint8, device=device())
    target = torch.empty_like(source)
    times = _times({**case.ways, "copy": lambda: target.copy_(source)}, budget)
    ours = times[next(iter(case.ways))]
    return Result(case.size, case.error, times, times["copy"] / ours)


def _times(ways: Mapping[str, Way], budget: Budget) -> dict[str, float]:
    return _times_cuda(ways) if device().type == "cuda" else _times_cpu(ways, budget)


def _times_cuda(ways: Mapping[str, Way]) -> dict[str, float]:
    from triton.testing import do_bench

    return {name: do_bench(way, return_mode="median") / 1e3 for name, way in ways.items()}


def _times_cpu(ways: Mapping[str, Way], budget: Budget) -> dict[str, float]:
    repeats = {name: max(1, math.ceil(budget.round / _once(way, 1))) for name, way in ways.items()}
    best = dict.fromkeys(ways, math.inf)
    end = time.perf_counter() + budget.case
    for done in range(budget.rounds):
        if done >= 3 and time.perf_counter() > end:
            break
        for name, way in ways.items():
            best[name] = min(best[name], _once(way, repeats[name]))
    return best


def _once(way: Way, repeats: int) -> float:
    way()
    start = time.perf_counter()
    for _ in range(repeats):
        way()
    return (time.perf_counter() - start) / repeats


def _table(results: Sequence[Result]) -> str:
    names = list(dict.fromkeys(name for result in results for name in result.seconds))
    rows = [
        [
            result.size,
            f"{result.error:.1e}",
            *(_cell(result.seconds, name) for name in names),
            f"{result.bandwidth:.0%}",
            f"{result.seconds['compiled'] / next(iter(result.seconds.values())):.2f}",
        ]
        for result in results
    ]
    return table(["size", "error", *(f"{name} us" for name in names), "of copy", "gain over compiled"], rows)


def _cell(seconds: Mapping[str, float], name: str) -> str:
    return f"{seconds[name] * 1e6:.1f}" if name in seconds else "-"


def _device_name() -> str:
    return torch.cuda.get_device_name() if device().type == "cuda" else "cpu"
