"""Progress of a long run on standard error: bars on a terminal, a line now and then elsewhere."""

from __future__ import annotations

from time import monotonic
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

EVERY_S = 30.0


class Meter:
    """One bar per part of the bench; `advance` after each measurement."""

    def __init__(self, totals: dict[str, tuple[int, int]]) -> None:
        """`totals` gives (measurements found done, measurements in all) by part."""
        self._console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        bars = Progress(*columns, TimeRemainingColumn(), console=self._console, disable=not self._console.is_terminal)
        self._ids = {part: bars.add_task(part, total=total, completed=done) for part, (done, total) in totals.items()}
        self._bars = bars
        self._said = self._start = monotonic()

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def note(self, text: str) -> None:
        """Say what happens now."""
        self._console.print(f"[{monotonic() - self._start:6.0f} s] {text}", highlight=False, markup=False)

    def advance(self, part: str) -> None:
        """One more measurement of the part is done."""
        self._bars.advance(self._ids[part])
        if not self._console.is_terminal and monotonic() - self._said > EVERY_S:
            self._said = monotonic()
            self.note(", ".join(self._state(task) for task in self._ids.values()))

    def _state(self, task: TaskID) -> str:
        state = self._bars.tasks[task]
        return f"{state.description} {state.completed:.0f}/{state.total:.0f}"
