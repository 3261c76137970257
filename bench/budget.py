"""Budget guidance against the hard end and against asking: accuracy and thinking length over five budgets.

    PYTHONSAFEPATH=1 .venv/bin/python bench/budget.py            # 300 problems on arith-large
    PYTHONSAFEPATH=1 .venv/bin/python bench/budget.py --quick    # does it work here?

Run as a file. The engine is the server's own, in this process; problems are of the evaluation split, one seed per
problem, the same for all rows. Budgets are shares of the mean length of unlimited thinking, which is measured first.

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

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any

import anyio
import typer

if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != here] + [str(here.parent)]

from bench import stats
from bench.chart import Series, chart
from bench.harness import ROOT, at_once, keep, machine, table, versions
from bench.tasks import Problem, correct, load
from thinkserve.strategies.engine import Sampling, Task
from thinkserve.strategies.testing import play
from thinkserve.strategies.text import Phases

if TYPE_CHECKING:
    from thinkserve.server.vllm_engine import VllmBackend

SHARES = (0.2, 0.3, 0.4, 0.5, 0.6)
KEY_SHARE = 0.4
BRIEF = "Be brief."
# The milestone's targets.
LEAST_GAIN, MOST_OFF = 0.20, 0.20


@dataclass(frozen=True, slots=True)
class Options:
    """What is measured, and how much of it."""

    model: str
    problems: int = 300
    level: str = "medium"
    seed: int = 0
    concurrency: int = 64
    temperature: float = 0.7
    max_tokens: int = 2048
    shares: tuple[float, ...] = SHARES


@dataclass(frozen=True, slots=True)
class Row:
    """One way to limit thinking. `budget` None: there is none. `words` are added to the question."""

    name: str
    budget: int | None = None
    strategy: str = "single"
    params: dict[str, Any] = field(default_factory=dict[str, Any])
    cut: int | None = None
    words: str = ""


@dataclass(frozen=True, slots=True)
class Measured:
    """A row's outcome, problem by problem."""

    row: Row
    right: list[bool]
    lengths: list[int]

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return fmean(self.right)

    @property
    def mean(self) -> float:
        """Mean thinking length in tokens."""
        return fmean(self.lengths)

    @property
    def off(self) -> float | None:
        """Mean of |length - budget| / budget."""
        budget = self.row.budget
        return None if budget is None else fmean(abs(length - budget) / budget for length in self.lengths)


def rows_of(budget: int) -> list[Row]:
    """The rows of one budget whose settings are known before anything is measured."""
    guided = {"budget": budget}
    return [
        Row("guidance", budget, "budget-guidance", guided),
        Row("guidance, soft", budget, "budget-guidance", guided | {"hard": False}),
        Row("hard end", budget, cut=budget),
        Row("asked", budget, words=f"Think for at most {budget} tokens."),
    ]


def cut_for(mean: float, lengths: Sequence[int]) -> int:
    """The hard end under which chains of these unlimited lengths have that mean: smallest b, mean(min(L, b)) >= it."""
    reach = range(1, max(lengths) + 1)
    return next((cut for cut in reach if fmean(min(length, cut) for length in lengths) >= mean), max(lengths))


async def measure(backend: VllmBackend, row: Row, problems: Sequence[Problem], options: Options) -> Measured:
    """Run a row over all problems, `concurrency` at once."""
    found: dict[int, tuple[bool, int]] = {}

    async def work(index: int) -> None:
        found[index] = await one(backend, row, problems[index], index, options)

    await at_once(options.concurrency, range(len(problems)), work)
    ordered = [found[index] for index in range(len(problems))]
    return Measured(row, [right for right, _ in ordered], [length for _, length in ordered])


async def one(backend: VllmBackend, row: Row, problem: Problem, index: int, options: Options) -> tuple[bool, int]:
    """Whether a problem was solved, and after how many thinking tokens."""
    question = f"{problem.question} {row.words}".strip()
    prompt = await backend.render([{"role": "user", "content": question}])
    sampling = Sampling(temperature=options.temperature)
    seed = options.seed * 1_000_003 + index
    task = Task(prompt.tokens, options.max_tokens, sampling, row.cut, phase=prompt.phase, seed=seed)
    engine = backend.engine(f"bench-{index}")
    answer, out = await play(row.strategy, engine, task, **row.params)
    phases = Phases(backend.info, prompt.phase)
    phases.push(answer.tokens)
    return correct(problem, engine.decode(out.tokens_of("answer"))), phases.length


async def run(options: Options, say: Callable[[str], None]) -> list[Measured]:
    """All rows, unlimited thinking first."""
    from thinkserve.server.settings import Settings
    from thinkserve.server.vllm_engine import create

    problems = load(options.level, options.problems, options.seed)
    backend = await create(Settings(model=options.model))
    try:
        free = await measure(backend, Row("unlimited"), problems, options)
        done = [free, await measure(backend, Row("asked to be brief", words=BRIEF), problems, options)]
        for share in options.shares:
            budget = max(1, round(share * free.mean))
            for row in rows_of(budget):
                done.append(await measure(backend, row, problems, options))
                say(f"{row.name} {budget}: {done[-1].accuracy:.3f} at {done[-1].mean:.0f} tokens")
                if row.name == "guidance":
                    cut = cut_for(done[-1].mean, free.lengths)
                    done.append(await measure(backend, Row("hard end, same mean", budget, cut=cut), problems, options))
        return done
    finally:
        await backend.aclose()


def report(done: Sequence[Measured], options: Options, date: str) -> str:
    """The tables and the verdicts."""
    what = f"{options.problems} {options.level} problems, T={options.temperature}, intervals: 95%"
    lines = [
        f"machine: {machine()}",
        f"versions: {', '.join(f'{name} {version}' for name, version in versions().items())}",
        f"model: {Path(options.model).name}, date: {date}, {what}",
        "",
    ]
    return "\n".join([*lines, table(HEADER, [cells(each) for each in done]), "", table(TARGETS, verdicts(done))]) + "\n"


HEADER = ("row", "budget", "accuracy", "thinking tokens", "off", "mean off")
TARGETS = ("expected", "target", "measured", "verdict")


def cells(each: Measured) -> list[str]:
    """A line of the table."""
    budget, off = each.row.budget, each.off
    accuracy = stats.wilson(sum(each.right), len(each.right))
    length = stats.mean([float(value) for value in each.lengths])
    shown = ["-", "-"] if budget is None or off is None else [f"{off:.3f}", f"{abs(each.mean - budget) / budget:.3f}"]
    return [each.row.name, str(budget or "-"), f"{accuracy:.3f}", f"{length:.0f}", *shown]


def verdicts(done: Sequence[Measured]) -> list[list[str]]:
    """The milestone's targets and what was measured."""
    free = next(each for each in done if each.row.name == "unlimited")
    guided = [each for each in done if each.row.name == "guidance"]
    at = min(guided, key=lambda each: abs((each.row.budget or 0) - KEY_SHARE * free.mean))
    cut = next(each for each in done if (each.row.name, each.row.budget) == ("hard end, same mean", at.row.budget))
    gain = stats.paired_difference([float(r) for r in at.right], [float(r) for r in cut.right])
    off = fmean(each.off or 0.0 for each in guided)
    at_40 = f"budget {at.row.budget} ({KEY_SHARE:.0%}): accuracy above a hard cut at the same mean"
    return [
        [at_40, f">= {LEAST_GAIN}", f"{gain:.3f}", "met" if gain.value >= LEAST_GAIN else "missed"],
        ["off, mean over budgets", f"<= {MOST_OFF}", f"{off:.3f}", "met" if off <= MOST_OFF else "missed"],
    ]


def plot(done: Sequence[Measured]) -> str:
    """Accuracy against mean thinking length, as SVG."""
    names = ("guidance", "hard end", "asked")
    series = [
        Series(name, sorted((each.mean, each.accuracy) for each in done if each.row.name == name)) for name in names
    ]
    points = [Series(each.row.name, [(each.mean, each.accuracy)]) for each in done if each.row.budget is None]
    return chart([*series, *points], "mean thinking tokens", "accuracy")


def command(
    model: Annotated[str, typer.Option(help="Model directory, with its predictor.")] = str(ROOT / "models/arith-large"),
    problems: Annotated[int, typer.Option(min=1)] = 300,
    level: str = "medium",
    seed: int = 0,
    concurrency: Annotated[int, typer.Option(min=1, help="Problems at work at once.")] = 64,
    out: Annotated[Path, typer.Option(help="Folder of the table, the JSON and the plot.")] = ROOT / "bench/results",
    quick: Annotated[bool, typer.Option("--quick", help="12 problems, two budgets; nothing is written.")] = False,
) -> None:
    """Measure, print the tables and one line of JSON, and keep both with the plot."""
    options = Options(model, problems, level, seed, concurrency)
    if quick:
        options = Options(model, 12, level, seed, concurrency, shares=(0.4, 0.6))
    done = anyio.run(run, options, lambda line: print(line, file=sys.stderr, flush=True))
    date = datetime.now(UTC).date().isoformat()
    text = report(done, options, date)
    rows = [{**asdict(each.row), "accuracy": each.accuracy, "mean": each.mean, "off": each.off} for each in done]
    told = asdict(options) | {"model": Path(model).name}
    data = {"machine": machine(), "versions": versions(), "date": date, "options": told, "rows": rows}
    print(text)
    print(json.dumps(data))
    if not quick:
        keep(out, f"{date}-budget-{Path(model).name}", text, data, plot(done))


if __name__ == "__main__":
    typer.run(command)
