"""Rows of a table, run through the whole server in this process: plain requests to the app, without sockets.

A row is what a client would send; a sample is what the response says it was and cost. Finished samples go into a
journal, so a run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from statistics import fmean
from time import perf_counter
from typing import Any

import httpx

from bench import stats
from bench.harness import ROOT, Journal, at_once, keep, machine, state, table, versions
from bench.stats import Interval
from bench.tasks import Problem, correct
from thinkserve.server.plan import Backend
from thinkserve.server.settings import Settings

# Header and rows.
Table = tuple[Sequence[str], Sequence[Sequence[str]]]

TIMEOUT_S = 3600.0
NAME = "bench"


class Refused(Exception):
    """The server did not answer a row's request; the message holds what it said."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What all rows of a run have in common: how tokens are drawn, and how many problems are at work at once."""

    concurrency: int = 32
    temperature: float = 0.7
    top_p: float = 0.95
    max_tokens: int = 2048
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the table: `body` is added to the request, `words` to the question."""

    name: str
    body: Mapping[str, Any] = field(default_factory=dict[str, Any])
    words: str = ""


@dataclass(frozen=True, slots=True)
class Sample:
    """What came of one problem; tokens as the response's usage tells them, `usage` its part about the strategy."""

    right: bool
    content: str
    thinking: int
    total: int
    wall_s: float
    usage: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Measured:
    """A row's samples, in the order of the problems."""

    row: Row
    samples: list[Sample]

    @property
    def accuracy(self) -> Interval:
        """Share of right answers."""
        return stats.wilson(sum(one.right for one in self.samples), len(self.samples))

    def mean(self, name: str) -> float:
        """Mean of a field, or of a number in `usage` (absent: 0)."""
        return fmean(self.values(name))

    def values(self, name: str) -> list[float]:
        """A field, or a number in `usage` (absent: 0), of every sample."""
        known = name in Sample.__dataclass_fields__
        return [float(getattr(one, name) if known else one.usage.get(name) or 0) for one in self.samples]


@asynccontextmanager
async def served(
    around: Callable[[Backend], Backend] | None = None, **settings: Any
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a server with these settings, started and stopped here; `around` may wrap its models."""
    from thinkserve.server.app import create_app
    from thinkserve.server.deployment import plan_models
    from thinkserve.server.roles import create
    from thinkserve.server.vllm_launch import is_cpu_build

    known = Settings(**settings, served_name=NAME, request_timeout_s=TIMEOUT_S, max_inflight=4096)
    backend = await create(known, plan_models(known, is_cpu_build()))
    try:
        transport = httpx.ASGITransport(create_app(known, around(backend) if around else backend))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=TIMEOUT_S) as client:
            yield client
    finally:
        await backend.aclose()


async def measure(
    client: httpx.AsyncClient, row: Row, problems: Sequence[Problem], asked: Asked, journal: Journal
) -> Measured:
    """Run a row over the problems that are not in the journal, `concurrency` at once. Raises Refused, grouped."""

    async def work(index: int) -> None:
        sample = await _one(client, row, problems[index], index, asked)
        journal.put(_key(row, index), asdict(sample))

    await at_once(asked.concurrency, [at for at in range(len(problems)) if _key(row, at) not in journal], work)
    return Measured(row, [Sample(**journal[_key(row, index)]) for index in range(len(problems))])


def _key(row: Row, index: int) -> str:
    # A row that asks for something else than it did is another row.
    asked = sha256(json.dumps([row.body, row.words], sort_keys=True).encode()).hexdigest()[:8]
    return f"{row.name} {asked}/{index}"


async def _one(client: httpx.AsyncClient, row: Row, problem: Problem, index: int, asked: Asked) -> Sample:
    body = {
        "model": NAME,
        "messages": [{"role": "user", "content": f"{problem.question} {row.words}".strip()}],
        "max_completion_tokens": asked.max_tokens,
        "temperature": asked.temperature,
        "top_p": asked.top_p,
        "seed": asked.seed * 1_000_003 + index,
        **row.body,
    }
    start = perf_counter()
    reply = await client.post("/v1/chat/completions", json=body)
    wall_s, told = perf_counter() - start, reply.json()
    if reply.status_code != 200:
        raise Refused(f"{row.name}: {told['error']['message']}")
    usage, content = told["usage"], told["choices"][0]["message"]["content"] or ""
    thinking = usage["completion_tokens_details"]["reasoning_tokens"]
    return Sample(correct(problem, content), content, thinking, usage["completion_tokens"], wall_s, usage["strategy"])


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a bench: its name, the folders of the model and of others `beside` it, the options that make it."""

    name: str
    model: str
    options: Mapping[str, object]
    beside: tuple[str, ...] = ()

    def journal(self) -> Journal:
        """Where finished samples are; one file for each state of what decides them."""
        known = state(self.options, [self.model, *self.beside])
        return Journal(ROOT / ".cache" / "bench" / f"{self.name}-{known}.jsonl")

    def publish(self, tables: Sequence[Table], plot: str | None, out: Path | None) -> None:
        """Print the tables and one line of JSON, and keep both, with the plot, in a folder if one is given."""
        date, model = datetime.now(UTC).date().isoformat(), Path(self.model).name
        lines = [
            f"machine: {machine()}",
            f"versions: {', '.join(f'{name} {version}' for name, version in versions().items())}",
            f"model: {model}, date: {date}, {', '.join(f'{key} {value}' for key, value in self.options.items())}",
        ]
        text = "\n\n".join(["\n".join(lines), *(table(header, rows) for header, rows in tables if rows)]) + "\n"
        told = [[dict(zip(header, row, strict=True)) for row in rows] for header, rows in tables]
        about = {"machine": machine(), "versions": versions(), "date": date, "model": model}
        data = {**about, "options": dict(self.options), "tables": told}
        print(text, json.dumps(data), sep="\n")
        if out is not None:
            keep(out, f"{date}-{self.name}-{model}", text, data, plot)


# The header of a table of expectations, whose last column is a verdict.
TARGETS = ("expected", "target", "measured", "verdict")


def verdict(met: bool) -> str:
    """The last column of a table of expectations."""
    return "met" if met else "missed"
