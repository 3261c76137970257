"""Search against sampling at equal cost: accuracy, tokens and scorer passes of every method at several budgets.

    PYTHONSAFEPATH=1 .venv/bin/python bench/search.py            # 300 hard problems, arith-small with arith-prm
    PYTHONSAFEPATH=1 .venv/bin/python bench/search.py --quick    # does it work here?
    PYTHONSAFEPATH=1 .venv/bin/python bench/search.py --method a-star --method best-of-n --chains 8

Run as a file. A budget is a number of chains' worth: methods that fix their number of solutions get that number, A*,
which does not, gets as many tokens as so many plain chains take on average (measured first). It ends with its first
solution, so only its width can spend a larger budget: k is the root of the number of chains, so that a search that
never goes back spends k chains and has the rest for going back. Its other limits are out of reach; what ended the
searches is told. "a-star-ahead" is A* with the parameters of AHEAD, found on other problems (seed 1). Methods that
choose among whole chains choose among the same ones, which are written once (`recorded.py`). Rows are resumable.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import anyio
import httpx
import typer

if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != here] + [str(here.parent)]

from bench import stats
from bench.chart import Series, chart
from bench.harness import ROOT, Journal
from bench.inprocess import TARGETS, Asked, Measured, Row, Run, measure, served, verdict
from bench.recorded import recorded
from bench.tasks import Problem, load

BUDGETS = (4, 8, 16, 32)
# How each method is told its number of chains; A*, whose cost is its own, gets a ceiling of tokens instead.
CHOOSERS: Mapping[str, str] = {"best-of-n": "k", "weighted-vote": "k", "majority": "k"}
AHEAD: Mapping[str, Any] = {"ahead": 0.05, "aggregate": "min"}
A_STARS: Mapping[str, Mapping[str, Any]] = {"a-star": {}, "a-star-ahead": AHEAD}
SEARCHES: Mapping[str, str] = {
    **dict.fromkeys(A_STARS, ""),
    "rebase": "width",
    "particle": "n",
    "beam": "n",
    "dvts": "n",
}
METHODS: Mapping[str, str] = {**CHOOSERS, **SEARCHES}
# The milestone's target: best-of-8's accuracy with this share of its tokens, and with fewer scorer passes.
MOST_TOKENS = 1 / 3
HEADER = (
    "method", "chains", "accuracy", "tokens", "scorer passes", "scorer tokens", "from cache", "wall s", "stopped by",
)  # fmt: skip
MOST_EXPANSIONS = 4096
# What the others are compared with.
BEST = "best-of-n@8"
AGAINST = ("row", f"accuracy minus {BEST}", "tokens", "scorer passes", "scorer tokens")


def row_of(method: str, chains: int, mean: float, max_tokens: int) -> Row:
    """The row of a method at a budget of `chains` chains of `mean` tokens, none of which may have over `max_tokens`."""
    name = METHODS[method]
    if name:
        return Row(f"{method}@{chains}", {"strategy": {"name": method, "params": {name: chains}}})
    total = round(chains * mean)
    # A search may spend k whole chains at most.
    k = max(2, round(math.sqrt(chains)), -(-total // max_tokens))
    params = {"k": k, "max_expansions": MOST_EXPANSIONS, **A_STARS[method]}
    return Row(f"{method}@{chains}", {"strategy": {"name": "a-star", "params": params, "max_total_tokens": total}})


async def bench(
    models: tuple[str, str],
    methods: Sequence[str],
    budgets: Sequence[int],
    problems: Sequence[Problem],
    asked: Asked,
    kept: Journal,
) -> list[Measured]:
    """All rows, plain chains first; of choosers the one with the most chains first, which hold those of the others."""
    done: list[Measured] = []

    async def add(client: httpx.AsyncClient, row: Row) -> None:
        done.append(await measure(client, row, problems, asked, kept))
        print(*cells(done[-1]), file=sys.stderr, flush=True)

    model, reward = models
    async with served(recorded, model=model, reward=reward) as client:
        await add(client, Row("single"))
        for chains in sorted(budgets, reverse=True):
            for method in filter(CHOOSERS.__contains__, methods):
                await add(client, row_of(method, chains, done[0].mean("total"), asked.max_tokens))
    async with served(model=model, reward=reward) as client:
        for chains in sorted(budgets):
            for method in filter(SEARCHES.__contains__, methods):
                await add(client, row_of(method, chains, done[0].mean("total"), asked.max_tokens))
    return done


def cells(each: Measured) -> list[str]:
    """A line of the table."""
    method, _, chains = each.row.name.partition("@")
    numbers = [f"{each.mean(name):.0f}" for name in ("total", "prm_passes", "prm_tokens")]
    cached = f"{each.mean('cache_hit_ratio'):.2f}"
    wall = "-" if method in CHOOSERS else f"{each.mean('wall_s'):.1f}"
    return [method, chains or "1", f"{each.accuracy:.3f}", *numbers, cached, wall, stops(each)]


def stops(each: Measured) -> str:
    """What ended the requests of a row, the most frequent first, each with its share."""
    counts = Counter(str(one.usage["stopped_by"]) for one in each.samples)
    return ", ".join(f"{why} {count / len(each.samples):.2f}" for why, count in counts.most_common())


def best_of(done: Sequence[Measured]) -> Measured | None:
    """The row that the others are compared with, if it has been measured."""
    return next((each for each in done if each.row.name == BEST), None)


def verdicts(done: Sequence[Measured], method: str) -> list[list[str]]:
    """Whether an A*, at the budget where it first is as accurate as best-of-8, spends as little as expected."""
    best, searches = best_of(done), [each for each in done if each.row.name.startswith(f"{method}@")]
    if best is None or not searches:
        return []
    reached = [each for each in searches if each.accuracy.value >= best.accuracy.value]
    one = min(reached or searches, key=lambda each: each.mean("total"))
    tokens = stats.paired_ratio(one.values("total"), best.values("total"))
    passes = stats.paired_ratio(one.values("prm_passes"), best.values("prm_passes"))
    name = f"{one.row.name} against {BEST}"
    return [
        [f"{name}: accuracy", f">= {best.accuracy.value:.3f}", f"{one.accuracy:.3f}", verdict(bool(reached))],
        [f"{name}: tokens", f"<= {MOST_TOKENS:.2f}", f"{tokens:.2f}", verdict(tokens.value <= MOST_TOKENS)],
        [f"{name}: scorer passes", "< 1", f"{passes:.2f}", verdict(passes.value < 1)],
    ]


def against(done: Sequence[Measured]) -> list[list[str]]:
    """Every other row problem by problem against best-of-8: what it gains, and what it costs as a ratio."""
    best = best_of(done)
    if best is None:
        return []

    def line(each: Measured) -> list[str]:
        gain = stats.paired_difference(each.values("right"), best.values("right"))
        costs = [stats.paired_ratio(each.values(n), best.values(n)) for n in ("total", "prm_passes", "prm_tokens")]
        return [each.row.name, f"{gain:.3f}", *(f"{cost:.2f}" for cost in costs)]

    return [line(each) for each in done if each is not best]


def plot(done: Sequence[Measured]) -> str:
    """Accuracy against generated tokens, as SVG."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for each in done:
        lines.setdefault(each.row.name.partition("@")[0], []).append((each.mean("total"), each.accuracy.value))
    return chart([Series(name, sorted(points)) for name, points in lines.items()], "generated tokens", "accuracy")


def command(
    model: Annotated[str, typer.Option(help="Model directory.")] = str(ROOT / "models/arith-small"),
    reward: Annotated[str, typer.Option(help="Process reward model.")] = str(ROOT / "models/arith-prm"),
    problems: Annotated[int, typer.Option(min=1)] = 300,
    level: str = "hard",
    method: Annotated[list[str] | None, typer.Option(help="One method; may be repeated.")] = None,
    chains: Annotated[list[int] | None, typer.Option(help="One budget; may be repeated.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Problems at work at once.")] = 64,
    out: Annotated[Path, typer.Option(help="Folder of the table, the JSON and the plot.")] = ROOT / "bench/results",
    quick: Annotated[bool, typer.Option("--quick", help="8 problems, one budget; nothing is written.")] = False,
) -> None:
    """Measure, print the tables and one line of JSON, and keep both with the plot."""
    methods, budgets = method or list(METHODS), (4,) if quick else tuple(chains or BUDGETS)
    if unknown := set(methods) - set(METHODS):
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}: not one of {', '.join(METHODS)}")
    count, asked = 8 if quick else problems, Asked(concurrency, temperature=0.8)
    told = {"reward": Path(reward).name, "problems": count, "level": level, **asdict(asked)}
    run = Run("search", model, told, (reward,))
    done = anyio.run(bench, (model, reward), methods, budgets, load(level, count, asked.seed), asked, run.journal())
    rows = list(map(cells, done))
    targets = [line for each in A_STARS for line in verdicts(done, each)]
    run.publish([(HEADER, rows), (AGAINST, against(done)), (TARGETS, targets)], plot(done), None if quick else out)


if __name__ == "__main__":
    typer.run(command)
