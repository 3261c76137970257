"""Shorter thinking by steering, beside what costs nothing: asking for brevity, and cutting at the same mean length.

    PYTHONSAFEPATH=1 .venv/bin/python bench/brevity.py            # 500 problems on arith-large, all of its vectors
    PYTHONSAFEPATH=1 .venv/bin/python bench/brevity.py --quick    # does it work here?

Run as a file. Every vector of the model acts at the scale that `thinkserve vectors calibrate` chose (1 without one).
`cut` rows end the thinking by force where the mean length equals that of the row above. Wall time is a request's, with
as many in flight.
"""

from __future__ import annotations

import sys
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
from bench.budget import BRIEF, cut_for
from bench.harness import ROOT, Journal
from bench.inprocess import TARGETS, Asked, Measured, Row, Run, measure, served, verdict
from bench.tasks import Problem, load

# The milestone's targets: thinking length against unsteered, and points of accuracy that it may cost.
MOST_LENGTH, MOST_LOSS = 0.50, 0.01
HEADER = ("row", "accuracy", "thinking tokens", "length ratio", "accuracy difference", "wall ratio")


async def rows(
    client: httpx.AsyncClient, problems: Sequence[Problem], asked: Asked, journal: Journal
) -> list[Measured]:
    """All rows, the unsteered one first; after each shorter one the cut at its mean length."""

    async def run(row: Row) -> Measured:
        print(row.name, file=sys.stderr, flush=True)
        return await measure(client, row, problems, asked, journal)

    free = await run(Row("unsteered"))
    lengths = [int(value) for value in free.values("thinking")]
    done = [free]
    vectors = (await client.get("/v1/steering/vectors")).json()["data"]
    for row in [Row(f"asked: {BRIEF}", words=BRIEF), *map(steered, vectors)]:
        done.append(await run(row))
        cut = cut_for(done[-1].mean("thinking"), lengths)
        done.append(await run(Row(f"cut at {cut}", {"thinking_token_budget": cut})))
    return done


def steered(vector: Mapping[str, Any]) -> Row:
    """The row of a vector, as the server lists it."""
    scale = vector["about"].get("calibration", {}).get("scale", 1.0)
    params = {"vector": vector["id"], "scale": scale}
    return Row(f"vector {vector['id']} at {scale:g}", {"strategy": {"name": "steering", "params": params}})


def cells(each: Measured, free: Measured) -> list[str]:
    """A line of the table."""
    length = stats.paired_ratio(each.values("thinking"), free.values("thinking"))
    loss = stats.paired_difference(each.values("right"), free.values("right"))
    wall = stats.paired_ratio(each.values("wall_s"), free.values("wall_s"))
    return [
        each.row.name, f"{each.accuracy:.3f}", f"{each.mean('thinking'):.0f}", f"{length:.2f}", f"{loss:+.3f}",
        f"{wall:.2f}",
    ]  # fmt: skip


def verdicts(done: Sequence[Measured]) -> list[list[str]]:
    """The milestone's targets and what the best vector reached: the shortest of those within the loss, else of all."""
    free = done[0]
    steered = [each for each in done if each.row.name.startswith("vector")]
    if not steered:
        return []
    within = [each for each in steered if free.accuracy.value - each.accuracy.value <= MOST_LOSS]
    best = min(within or steered, key=lambda each: each.mean("thinking"))
    ratio = stats.paired_ratio(best.values("thinking"), free.values("thinking"))
    loss = stats.paired_difference(free.values("right"), best.values("right"))
    return [
        [f"{best.row.name}: length", f"<= {MOST_LENGTH}", f"{ratio:.2f}", verdict(ratio.value <= MOST_LENGTH)],
        [f"{best.row.name}: points lost", f"<= {MOST_LOSS}", f"{loss:.3f}", verdict(loss.value <= MOST_LOSS)],
    ]


async def bench(model: str, problems: Sequence[Problem], asked: Asked, journal: Journal) -> list[Measured]:
    """Start the server and measure."""
    async with served(model=model) as client:
        return await rows(client, problems, asked, journal)


def command(
    model: Annotated[str, typer.Option(help="Model directory, with its vectors.")] = str(ROOT / "models/arith-large"),
    problems: Annotated[int, typer.Option(min=1)] = 500,
    level: str = "medium",
    concurrency: Annotated[int, typer.Option(min=1, help="Problems at work at once.")] = 32,
    out: Annotated[Path, typer.Option(help="Folder of the table and the JSON.")] = ROOT / "bench/results",
    quick: Annotated[bool, typer.Option("--quick", help="12 problems; nothing is written.")] = False,
) -> None:
    """Measure, print the tables and one line of JSON, and keep both."""
    count, asked = 12 if quick else problems, Asked(concurrency)
    run = Run("brevity", model, {"problems": count, "level": level, **asdict(asked)})
    done = anyio.run(bench, model, load(level, count, asked.seed), asked, run.journal())
    tables = [(HEADER, [cells(each, done[0]) for each in done]), (TARGETS, verdicts(done))]
    run.publish(tables, None, None if quick else out)


if __name__ == "__main__":
    typer.run(command)
