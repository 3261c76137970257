"""The report as people read it: Markdown tables that README pastes, and the same figures as one JSON document."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from bench import report
from bench.harness import Journal, Options, machine, table, versions
from bench.servers import Launch
from bench.stats import Interval


def text(journal: Journal, options: Options, launches: tuple[Launch, ...], date: str) -> str:
    """Machine line and every table for which there are figures."""
    return "\n\n".join([_head(options, date), *_tables(journal, options, launches)])


def document(journal: Journal, options: Options, launches: tuple[Launch, ...], date: str) -> dict[str, Any]:
    """The report as data."""
    drift = report.drift(journal, options)
    return {
        "date": date,
        "machine": machine(),
        "versions": versions(),
        "options": asdict(options) | {"model": _name(options)},
        "strategies": [asdict(row) for row in report.strategy_rows(journal, options)],
        "drift": asdict(drift) if drift else None,
        "serve": [asdict(row) for row in report.chat_rows(journal, options)],
        "startup": [asdict(row) for row in report.start_rows(journal, options, launches)],
        "expected": [asdict(one) | {"verdict": one.verdict} for one in report.expectations(journal, options, launches)],
    }


def _head(options: Options, date: str) -> str:
    packages = ", ".join(f"{name} {number}" for name, number in versions().items())
    return f"machine: {machine()}\nversions: {packages}\nmodel: {_name(options)}, date: {date}, intervals: 95%"


def _name(options: Options) -> str:
    """The model's folder; where it lies is nobody's business."""
    return options.model.rstrip("/").rpartition("/")[2]


def _tables(journal: Journal, options: Options, launches: tuple[Launch, ...]) -> Iterator[str]:
    if rows := report.strategy_rows(journal, options):
        yield _strategies(rows, options)
    if drift := report.drift(journal, options):
        yield f"drift: {report.REFERENCE} again at the end, wall time over that at the start: {drift:.3f}"
    if chat := report.chat_rows(journal, options):
        yield _chat(chat, options)
    if starts := report.start_rows(journal, options, launches):
        yield _starts(starts)
    if expected := report.expectations(journal, options, launches):
        header = ("expected", "target", "measured", "verdict")
        yield table(header, [(one.name, one.target, one.measured, one.verdict) for one in expected])


def _strategies(rows: list[report.StrategyRow], options: Options) -> str:
    header = (
        f"{rows[0].problems} {options.level} problems, {options.concurrency} at once", "accuracy", "thinking tokens",
        "total tokens", "wall s", "thinking ratio", "wall ratio", "reported = counted",
    )  # fmt: skip
    return table(header, [_strategy(row) for row in rows])


def _strategy(row: report.StrategyRow) -> tuple[str, ...]:
    return (
        row.name,
        f"{row.accuracy:.3f}",
        f"{row.thinking:.0f}",
        f"{row.total:.0f}",
        f"{row.wall_s:.2f}",
        f"{row.thinking_ratio:.2f}",
        f"{row.wall_ratio:.2f}",
        _count(row),
    )


def _count(row: report.StrategyRow) -> str:
    if row.name == report.CLOSING:
        return f"no usage; {row.counted:,}"
    return f"yes; {row.counted:,}" if row.reported == row.counted else f"NO; {row.reported:,} != {row.counted:,}"


def _chat(rows: list[report.ChatRow], options: Options) -> str:
    header = (
        f"plain chat, {options.chat_tokens} tokens at most", "ours tok/s", "vLLM tok/s", "ratio", "ours req/s",
        "vLLM req/s", "ours first ms", "vLLM first ms",
    )  # fmt: skip
    return table(header, [_load(row) for row in rows])


def _load(row: report.ChatRow) -> tuple[str, ...]:
    speeds = (f"{row.ours:.0f}", f"{row.vllm:.0f}", f"{row.ratio:.3f}")
    requests = (f"{row.ours_requests:.2f}", f"{row.vllm_requests:.2f}")
    return (row.load, *speeds, *requests, f"{row.ours_first_ms:.0f}", f"{row.vllm_first_ms:.0f}")


def _starts(rows: list[report.StartRow]) -> str:
    header = ("start to first answer", "cold s", "warm s")
    return table(header, [(row.server, f"{row.cold:.1f}", f"{_warm(row):.1f}") for row in rows])


def _warm(row: report.StartRow) -> Interval:
    return Interval(row.warm, row.warm_low, row.warm_high)
