"""TrimR: what it saves on a model that overthinks, rule by rule and together, with what it costs in right answers.

    PYTHONSAFEPATH=1 .venv/bin/python bench/trimr.py            # 300 medium problems, at 1 and 32 in flight
    PYTHONSAFEPATH=1 .venv/bin/python bench/trimr.py --quick    # does it work here?

Run as a file. `changed` is the share of problems whose final answer is another than that of the untrimmed chain with
the same seed, `spoilt` those of them that were right before. Three agreeing results end a chain, as published; the row
"two agree" asks for one less. Tokens are the chain's own; `all tokens`, their ratio and wall time include the verifier.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import anyio
import typer

if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != here] + [str(here.parent)]

from bench import stats
from bench.harness import ROOT, Journal
from bench.inprocess import TARGETS, Asked, Measured, Row, Run, measure, served, verdict
from bench.tasks import Problem, load
from thinkserve.strategies.text import answer_of

RULES = ("overthinking", "underthinking", "repetition")
# The milestone's targets: fewer tokens, and points of accuracy that it may cost.
MOST_TOKENS, MOST_LOSS = 0.60, 0.01
HEADER = (
    "row", "in flight", "accuracy", "tokens", "all tokens", "token ratio", "all ratio", "wall ratio", "changed",
    "spoilt",
)  # fmt: skip


def row_of(name: str, rules: Sequence[str], concurrency: int, **more: Any) -> Row:
    """TrimR with some of its rules."""
    params: dict[str, Any] = {rule: rule in rules for rule in RULES} | more
    return Row(f"{name}/{concurrency}", {"strategy": {"name": "trimr", "params": params}})


async def bench(
    model: str, verifier: str, levels: Sequence[int], problems: Sequence[Problem], asked: Asked, kept: Journal
) -> list[list[Measured]]:
    """For each number of requests in flight: untrimmed, each rule alone, all rules."""
    found: list[list[Measured]] = []
    async with served(model=model, verifier=verifier, guide="none", reward="none") as client:
        for concurrency in levels:
            how = replace(asked, concurrency=concurrency)
            alone = [row_of(rule, [rule], concurrency) for rule in RULES]
            sooner = row_of("all rules, two agree", RULES, concurrency, agreements=1)
            rows = [Row(f"untrimmed/{concurrency}"), *alone, sooner, row_of("all rules", RULES, concurrency)]
            found.append([await measure(client, row, problems, how, kept) for row in rows])
    return found


def changed(each: Measured, free: Measured) -> tuple[float, float]:
    """Share of problems with another final answer, and share of those that were right and no longer are."""
    pairs = list(zip(each.samples, free.samples, strict=True))
    other = fmean(answer_of(one.content) != answer_of(base.content) for one, base in pairs)
    return other, fmean(base.right and not one.right for one, base in pairs)


def cells(each: Measured, free: Measured) -> list[str]:
    """A line of the table."""
    name, _, concurrency = each.row.name.partition("/")
    own = "winner_completion_tokens"
    ratios = [stats.paired_ratio(each.values(of), free.values(of)) for of in (own, "total", "wall_s")]
    other, spoilt = changed(each, free)
    return [
        name, concurrency, f"{each.accuracy:.3f}", f"{each.mean(own):.0f}", f"{each.mean('total'):.0f}",
        *(f"{ratio:.2f}" for ratio in ratios), f"{other:.3f}", f"{spoilt:.3f}",
    ]  # fmt: skip


def verdicts(free: Measured, whole: Measured) -> list[list[str]]:
    """The milestone's targets for all rules together, with one number of agreements or the other."""
    own, name = "winner_completion_tokens", whole.row.name
    tokens = stats.paired_ratio(whole.values(own), free.values(own))
    loss = stats.paired_difference(free.values("right"), whole.values("right"))
    return [
        [f"{name}: tokens", f"<= {MOST_TOKENS:.2f}", f"{tokens:.2f}", verdict(tokens.value <= MOST_TOKENS)],
        [f"{name}: points lost", f"<= {MOST_LOSS}", f"{loss:.3f}", verdict(loss.value <= MOST_LOSS)],
    ]


def command(
    model: Annotated[str, typer.Option(help="Model directory.")] = str(ROOT / "models/arith-large"),
    verifier: Annotated[str, typer.Option(help="The verifier.")] = str(ROOT / "models/arith-large"),
    problems: Annotated[int, typer.Option(min=1)] = 300,
    level: str = "medium",
    in_flight: Annotated[list[int] | None, typer.Option(help="Problems at work at once; may be repeated.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the table and the JSON.")] = ROOT / "bench/results",
    quick: Annotated[bool, typer.Option("--quick", help="12 problems; nothing is written.")] = False,
) -> None:
    """Measure, print the tables and one line of JSON, and keep both."""
    count, asked, levels = 12 if quick else problems, Asked(), in_flight or [1, 32]
    at_once = {"concurrency": " and ".join(map(str, levels))}
    told = {"verifier": Path(verifier).name, "problems": count, "level": level, **asdict(asked), **at_once}
    run = Run(f"trimr-at-{'-'.join(map(str, levels))}", model, told, (verifier,))
    found = anyio.run(bench, model, verifier, levels, load(level, count, asked.seed), asked, run.journal())
    lines = [cells(each, rows[0]) for rows in found for each in rows]
    targets = [line for rows in found for whole in rows[-2:] for line in verdicts(rows[0], whole)]
    run.publish([(HEADER, lines), (TARGETS, targets)], None, None if quick else out)


if __name__ == "__main__":
    typer.run(command)
