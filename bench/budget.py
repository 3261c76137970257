"""Budget guidance against the hard end and against asking: accuracy and thinking length over five budgets.

    PYTHONSAFEPATH=1 .venv/bin/python bench/budget.py            # 300 problems on arith-large
    PYTHONSAFEPATH=1 .venv/bin/python bench/budget.py --quick    # does it work here?

Run as a file. Budgets are shares of the mean length of unlimited thinking, which is measured first.

| row | what is asked for |
|---|---|
| unlimited | nothing |
| guidance | strategy budget-guidance, budget B, its hard end included (slack 0.25) |
| guidance, soft | the same without a hard end |
| hard end | thinking_token_budget B: the closing tag is forced |
| hard end, same mean | the same, cut where the mean length equals that of the guidance row |
| asked | "Think for at most B tokens." in the prompt |
| asked to be brief | the family's own wording, "Be brief." |

`off` is the mean over problems of |length - B| / B; a forced end counts like any other.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
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
from bench.tasks import Problem, load

SHARES = (0.2, 0.3, 0.4, 0.5, 0.6)
KEY_SHARE = 0.4
BRIEF = "Be brief."
# The milestone's targets: points of accuracy above a cut, and how far lengths may be from the budget.
LEAST_GAIN, MOST_OFF = 0.20, 0.20
HEADER = ("row", "budget", "accuracy", "thinking tokens", "off", "mean off")


@dataclass(frozen=True, slots=True)
class Limited:
    """A way to limit thinking, the budget that it was asked for (None: there is none), and what came of it."""

    way: str
    budget: int | None
    measured: Measured

    @property
    def lengths(self) -> list[int]:
        """Thinking tokens, problem by problem."""
        return [int(value) for value in self.measured.values("thinking")]

    @property
    def mean(self) -> float:
        """Mean thinking length in tokens."""
        return self.measured.mean("thinking")

    @property
    def off(self) -> float | None:
        """Mean of |length - budget| / budget."""
        budget = self.budget
        return None if budget is None else fmean(abs(length - budget) / budget for length in self.lengths)


def cut(name: str, budget: int) -> Row:
    """Thinking that is ended by force."""
    return Row(f"{name} {budget}", {"thinking_token_budget": budget})


def rows_of(budget: int) -> dict[str, Row]:
    """The rows of one budget whose settings are known before anything is measured, by their way to limit."""

    def guided(name: str, **params: Any) -> Row:
        strategy = {"name": "budget-guidance", "params": {"budget": budget, **params}}
        return Row(f"{name} {budget}", {"strategy": strategy})

    return {
        "guidance": guided("guidance"),
        "guidance, soft": guided("guidance, soft", hard=False),
        "hard end": cut("hard end", budget),
        "asked": Row(f"asked {budget}", words=f"Think for at most {budget} tokens."),
    }


def cut_for(mean: float, lengths: Sequence[int]) -> int:
    """The hard end under which chains of these unlimited lengths have that mean: smallest b, mean(min(L, b)) >= it."""
    reach = range(1, max(lengths) + 1)
    return next((cut for cut in reach if fmean(min(length, cut) for length in lengths) >= mean), max(lengths))


async def rows(
    client: httpx.AsyncClient, shares: Sequence[float], problems: Sequence[Problem], asked: Asked, journal: Journal
) -> list[Limited]:
    """All rows, unlimited thinking first; after guidance the cut at its mean length."""
    done: list[Limited] = []

    async def add(way: str, budget: int | None, row: Row) -> Limited:
        done.append(Limited(way, budget, await measure(client, row, problems, asked, journal)))
        print(*cells(done[-1]), file=sys.stderr, flush=True)
        return done[-1]

    free = await add("unlimited", None, Row("unlimited"))
    await add("asked to be brief", None, Row("asked to be brief", words=BRIEF))
    for share in shares:
        budget = max(1, round(share * free.mean))
        for way, row in rows_of(budget).items():
            found = await add(way, budget, row)
            if way == "guidance":
                await add("hard end, same mean", budget, cut("cut at", cut_for(found.mean, free.lengths)))
    return done


def cells(each: Limited) -> list[str]:
    """A line of the table."""
    length = stats.mean(each.measured.values("thinking"))
    shown = ["-", "-"]
    if each.budget is not None:
        shown = [f"{each.off:.3f}", f"{abs(each.mean - each.budget) / each.budget:.3f}"]
    return [each.way, str(each.budget or "-"), f"{each.measured.accuracy:.3f}", f"{length:.0f}", *shown]


def verdicts(done: Sequence[Limited]) -> list[list[str]]:
    """The milestone's targets and what was measured."""
    free = next(each for each in done if each.way == "unlimited")
    guided = [each for each in done if each.way == "guidance"]
    at = min(guided, key=lambda each: abs((each.budget or 0) - KEY_SHARE * free.mean))
    same = next(each for each in done if (each.way, each.budget) == ("hard end, same mean", at.budget))
    gain = stats.paired_difference(at.measured.values("right"), same.measured.values("right"))
    off = fmean(each.off or 0.0 for each in guided)
    at_40 = f"budget {at.budget} ({KEY_SHARE:.0%}): accuracy above a hard cut at the same mean"
    return [
        [at_40, f">= {LEAST_GAIN}", f"{gain:.3f}", verdict(gain.value >= LEAST_GAIN)],
        ["off, mean over budgets", f"<= {MOST_OFF}", f"{off:.3f}", verdict(off <= MOST_OFF)],
    ]


def plot(done: Sequence[Limited]) -> str:
    """Accuracy against mean thinking length, as SVG."""

    def point(each: Limited) -> tuple[float, float]:
        return each.mean, each.measured.accuracy.value

    ways = ("guidance", "hard end", "asked")
    lines = [Series(way, sorted(point(each) for each in done if each.way == way)) for way in ways]
    points = [Series(each.way, [point(each)]) for each in done if each.budget is None]
    return chart([*lines, *points], "mean thinking tokens", "accuracy")


async def bench(
    model: str, shares: Sequence[float], problems: Sequence[Problem], asked: Asked, journal: Journal
) -> list[Limited]:
    """Start the server and measure."""
    async with served(model=model) as client:
        return await rows(client, shares, problems, asked, journal)


def command(
    model: Annotated[str, typer.Option(help="Model directory, with its predictor.")] = str(ROOT / "models/arith-large"),
    problems: Annotated[int, typer.Option(min=1)] = 300,
    level: str = "medium",
    concurrency: Annotated[int, typer.Option(min=1, help="Problems at work at once.")] = 64,
    out: Annotated[Path, typer.Option(help="Folder of the table, the JSON and the plot.")] = ROOT / "bench/results",
    quick: Annotated[bool, typer.Option("--quick", help="12 problems, two budgets; nothing is written.")] = False,
) -> None:
    """Measure, print the tables and one line of JSON, and keep both with the plot."""
    count, shares, asked = (12, (0.4, 0.6), Asked(12)) if quick else (problems, SHARES, Asked(concurrency))
    run = Run("budget", model, {"problems": count, "level": level, **asdict(asked)})
    done = anyio.run(bench, model, shares, load(level, count, asked.seed), asked, run.journal())
    tables = [(HEADER, [cells(each) for each in done]), (TARGETS, verdicts(done))]
    run.publish(tables, plot(done), None if quick else out)


if __name__ == "__main__":
    typer.run(command)
