"""Speculative thinking: the small model alone, the large one alone, and both together, on the same problems.

    PYTHONSAFEPATH=1 .venv/bin/python bench/speculative.py            # 500 medium problems
    PYTHONSAFEPATH=1 .venv/bin/python bench/speculative.py --quick    # does it work here?

Run as a file. `recovered` is the share of the accuracy difference between the two models that both together recover;
`length` counts the tokens of the returned completion, `guide` the share of all generated tokens that the guide wrote.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import anyio
import typer

if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != here] + [str(here.parent)]

from bench import stats
from bench.harness import ROOT, Journal
from bench.inprocess import TARGETS, Asked, Measured, Row, Run, measure, served, verdict
from bench.tasks import Problem, load

# The milestone's targets: share of the difference recovered, share of tokens by the guide, length against small's own.
LEAST_RECOVERED, MOST_GUIDE, MOST_LENGTH = 0.50, 0.25, 1.0
HEADER = ("row", "accuracy", "length", "tokens in all", "guide's share", "wall s")


async def bench(small: str, large: str, problems: Sequence[Problem], asked: Asked, kept: Journal) -> list[Measured]:
    """The three rows: small alone, large alone, both."""
    async with served(model=small, guide=large, verifier="none", reward="none") as client:
        alone = await measure(client, Row("small alone"), problems, asked, kept)
        both = await measure(client, Row("both", {"strategy": {"name": "speculative-thinking"}}), problems, asked, kept)
    async with served(model=large, guide="none", verifier="none", reward="none") as client:
        return [alone, await measure(client, Row("large alone"), problems, asked, kept), both]


def share(each: Measured) -> float:
    """Of all tokens, those that the guide generated."""
    return each.mean("draft_tokens") / each.mean("total")


def lengths(each: Measured) -> list[float]:
    """Tokens of each completion, the words of a cue included."""
    written, ours = each.values("winner_completion_tokens"), each.values("injected_tokens")
    return [sum(both) for both in zip(written, ours, strict=True)]


def cells(each: Measured) -> list[str]:
    """A line of the table."""
    length = stats.mean(lengths(each))
    wall = stats.mean(each.values("wall_s"))
    return [
        each.row.name, f"{each.accuracy:.3f}", f"{length:.0f}", f"{each.mean('total'):.0f}", f"{share(each):.3f}",
        f"{wall:.2f}",
    ]  # fmt: skip


def verdicts(small: Measured, large: Measured, both: Measured) -> list[list[str]]:
    """The milestone's targets and what was measured."""
    low, high, reached = (each.accuracy.value for each in (small, large, both))
    recovered = (reached - low) / (high - low) if high > low else float("nan")
    length, part = stats.paired_ratio(lengths(both), lengths(small)), share(both)
    return [
        ["difference recovered", f">= {LEAST_RECOVERED}", f"{recovered:.2f}", verdict(recovered >= LEAST_RECOVERED)],
        ["guide's share of tokens", f"<= {MOST_GUIDE:.2f}", f"{part:.2f}", verdict(part <= MOST_GUIDE)],
        ["length against small's", f"<= {MOST_LENGTH:.2f}", f"{length:.2f}", verdict(length.value <= MOST_LENGTH)],
    ]


def command(
    small: Annotated[str, typer.Option(help="The target.")] = str(ROOT / "models/arith-small"),
    large: Annotated[str, typer.Option(help="The guide.")] = str(ROOT / "models/arith-large"),
    problems: Annotated[int, typer.Option(min=1)] = 500,
    level: str = "medium",
    concurrency: Annotated[int, typer.Option(min=1, help="Problems at work at once.")] = 16,
    out: Annotated[Path, typer.Option(help="Folder of the table and the JSON.")] = ROOT / "bench/results",
    quick: Annotated[bool, typer.Option("--quick", help="12 problems; nothing is written.")] = False,
) -> None:
    """Measure, print the tables and one line of JSON, and keep both."""
    count, asked = 12 if quick else problems, Asked(concurrency)
    told = {"guide": Path(large).name, "problems": count, "level": level, **asdict(asked)}
    run = Run("speculative", small, told, (large,))
    done = anyio.run(bench, small, large, load(level, count, asked.seed), asked, run.journal())
    run.publish([(HEADER, list(map(cells, done))), (TARGETS, verdicts(*done))], None, None if quick else out)


if __name__ == "__main__":
    typer.run(command)
