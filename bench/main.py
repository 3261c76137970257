"""`make bench`: start what is needed, measure, print one report and one JSON line.

The run is a list of phases. A phase is one server, started once, and what is measured on it, or for plain chat both; a
phase whose measurements are all in the journal is skipped. The start-ups come last.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import anyio
import typer
from anyio.abc import TaskStatus

from bench import check, serve, startup, strategies, tables, tasks
from bench.harness import PARTS, ROOT, Journal, Options, Work, machine, run_folder, slug
from bench.meter import Meter
from bench.report import REFERENCE
from bench.servers import Launch, Server, family, running, thinkserve
from bench.tasks import Problem
from bench.vllm_server import vllm_server
from thinkserve.server.vllm_launch import is_cpu_build

app = typer.Typer(add_completion=False)
DEFAULTS = Options(str(ROOT / "models" / "arith-small"))


@dataclass(frozen=True, slots=True)
class Job:
    """Something measured on running servers: the part it belongs to, the journal keys it fills, how."""

    part: str
    keys: tuple[str, ...]
    run: Callable[[Mapping[str, Server], Callable[[], None]], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Phase:
    """Servers, one or both, and the jobs they are started for."""

    launches: tuple[Launch, ...]
    jobs: tuple[Job, ...]

    def missing(self, journal: Journal) -> bool:
        """Whether anything is left to do."""
        return any(key not in journal for job in self.jobs for key in job.keys)


class Bench:
    """One run: its options, its parts, its journal."""

    def __init__(self, options: Options, parts: Sequence[str], folder: Path, rows: Sequence[str] = ()) -> None:
        """`rows` names the strategy rows that are wanted beside majority@8; none: all of them."""
        cpu = is_cpu_build()
        self.options, self.parts, self.folder = options, parts, folder
        self.journal = Journal(folder / "journal.jsonl")
        self.launches = (thinkserve(options.model), vllm_server(options.model, cpu=cpu))
        # Without a model the embedded family is served, be the one under test what it may.
        self.starts = (*self.launches, family()) if options.model == DEFAULTS.model else self.launches
        self.rows = [row for row in strategies.ROWS if not rows or row.name in {*rows, REFERENCE}]
        self.drift = () if rows else (strategies.DRIFT_ROW,)
        self.problems = tasks.load(options.level, options.problems, options.seed)

    async def run(self) -> None:
        """Measure what is missing."""
        phases = [phase for phase in self.phases() if phase.jobs]
        with Meter(self._totals(phases)) as meter:
            for phase in phases:
                if phase.missing(self.journal):
                    await self._phase(phase, meter)
            if "startup" in self.parts:
                meter.note("starting the servers again and again")
                await startup.measure(self.starts, self.folder, self._work(partial(meter.advance, "startup")))

    async def _phase(self, phase: Phase, meter: Meter) -> None:
        async with AsyncExitStack() as stack:
            servers: dict[str, Server] = {}
            for launch in phase.launches:
                meter.note(f"starting {launch.name}")
                server = await stack.enter_async_context(running(launch, self.folder / f"{launch.name}.log"))
                servers[launch.name] = server
                meter.note(f"{launch.name} answers after {server.first_answer_s:.1f} s")
            for job in phase.jobs:
                await job.run(servers, partial(meter.advance, job.part))

    def phases(self) -> Iterator[Phase]:
        """The strategies on our server, on vLLM's, on ours again; then chat on both."""
        for number in (0, 1):
            for launch in self.launches:
                if jobs := tuple(self._strategies(launch.name, number)):
                    yield Phase((launch,), jobs)
        if "serve" in self.parts:
            asked = "strategies" in self.parts
            checks = () if asked else tuple(self._check(launch.name) for launch in self.launches)
            yield Phase(self.launches, (*checks, self._chat()))

    def _strategies(self, server: str, number: int) -> Iterator[Job]:
        if "strategies" not in self.parts:
            return
        if number == 0:
            yield self._check(server)
        problems = self.problems[: None if number == 0 else self.options.drift_problems]
        if mine := [row for row in (self.drift if number else self.rows) if row.server == server]:
            yield self._rows(mine, problems)

    def _work(self, advance: Callable[[], None]) -> Work:
        return Work(self.options, self.journal, advance)

    def _check(self, name: str) -> Job:
        async def run(servers: Mapping[str, Server], advance: Callable[[], None]) -> None:
            await check.measure(servers[name], name, self.problems, self.journal)

        return Job("check", (check.key(name),), run)

    def _rows(self, rows: Sequence[strategies.Row], problems: Sequence[Problem]) -> Job:
        async def run(servers: Mapping[str, Server], advance: Callable[[], None]) -> None:
            await strategies.measure(servers[rows[0].server], rows, problems, self._work(advance))

        schedule = strategies.schedule(rows, len(problems), self.options.chunk)
        return Job("strategies", tuple(key for key, _, _ in schedule), run)

    def _chat(self) -> Job:
        async def run(servers: Mapping[str, Server], advance: Callable[[], None]) -> None:
            await serve.measure(servers, self.problems, self._work(advance))

        return Job("serve", tuple(key for key, *_ in serve.schedule(self.options)), run)

    def _totals(self, phases: Sequence[Phase]) -> dict[str, tuple[int, int]]:
        """Measurements done and in all, by part."""
        keys: dict[str, list[str]] = {part: [] for part in self.parts}
        for job in (job for phase in phases for job in phase.jobs):
            if job.part in keys:
                keys[job.part] += job.keys
        if "startup" in keys:
            keys["startup"] = [key for key, _, _ in startup.schedule(self.options, self.starts)]
        return {part: (sum(key in self.journal for key in names), len(names)) for part, names in keys.items()}


@app.command()
def bench(
    *,
    problems: Annotated[int, typer.Option(help="Fresh problems per row.")] = DEFAULTS.problems,
    quick: Annotated[bool, typer.Option(help="A small run that proves that everything works.")] = False,
    only: Annotated[
        list[str] | None, typer.Option(help=f"Only this part; may be repeated: {', '.join(PARTS)}.")
    ] = None,
    model: Annotated[Path, typer.Option(help="Directory of the model.", show_default="models/arith-small")] = Path(
        DEFAULTS.model
    ),
    level: Annotated[str, typer.Option(help="Difficulty of the problems.")] = DEFAULTS.level,
    seed: Annotated[int, typer.Option(help="Seed of problems and sampling.")] = DEFAULTS.seed,
    concurrency: Annotated[int, typer.Option(help="Problems at once in the strategy rows.")] = DEFAULTS.concurrency,
    max_tokens: Annotated[int, typer.Option(help="Most tokens per chain in the strategy rows.")] = DEFAULTS.max_tokens,
    row: Annotated[
        list[str] | None, typer.Option(help="Only this strategy row and majority@8; may be repeated.")
    ] = None,
    load: Annotated[
        list[int] | None, typer.Option(help="Only this concurrency of plain chat; may be repeated.")
    ] = None,
    fresh: Annotated[bool, typer.Option(help="Forget what an earlier run with these options has measured.")] = False,
    out: Annotated[Path | None, typer.Option(help="Results file (.json; a .md lies beside it).")] = None,
) -> None:
    """Measure strategies, plain-chat throughput and start-up against vLLM's own server on this machine."""
    _known("--only", only, PARTS)
    _known("--row", row, [one.name for one in strategies.ROWS])
    options = Options(str(model.resolve()), problems, level, seed, concurrency, max_tokens)
    options = replace(options.quick() if quick else options, chat_levels=tuple(load or options.chat_levels))
    folder = run_folder(options)
    if fresh:
        (folder / "journal.jsonl").unlink(missing_ok=True)
    run = Bench(options, only or PARTS, folder, row or ())
    if not anyio.run(to_the_end, run.run, backend_options={"use_uvloop": find_spec("uvloop") is not None}):
        raise typer.Exit(128 + signal.SIGTERM)
    _publish(run, out or _results(folder if quick or only or row else ROOT / "bench" / "results"))


async def to_the_end(work: Callable[[], Awaitable[None]]) -> bool:
    """Whether the work was finished; SIGTERM cancels it, so that no server is left behind."""
    done = False

    async with anyio.create_task_group() as group:

        async def listen(*, task_status: TaskStatus[None]) -> None:
            with anyio.open_signal_receiver(signal.SIGTERM) as signals:
                task_status.started()
                async for _ in signals:
                    group.cancel_scope.cancel()

        await group.start(listen)
        await work()
        done = True
        group.cancel_scope.cancel()
    return done


def _known(option: str, given: Sequence[str] | None, names: Sequence[str]) -> None:
    if unknown := set(given or ()) - set(names):
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}; there are {', '.join(names)}", param_hint=option)


def _results(folder: Path) -> Path:
    """`<date>-<machine>.json`."""
    return folder / f"{datetime.now(UTC):%Y-%m-%d}-{slug(','.join(machine().split(',')[:2]))}.json"


def _publish(run: Bench, path: Path) -> None:
    """Print the tables and, as the last line, the JSON document; keep both beside each other."""
    date = f"{datetime.now(UTC):%Y-%m-%d}"
    text = tables.text(run.journal, run.options, run.starts, date)
    document = json.dumps(tables.document(run.journal, run.options, run.starts, date))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(document + "\n")
    path.with_suffix(".md").write_text(text + "\n")
    print(text, document, sep="\n\n")
