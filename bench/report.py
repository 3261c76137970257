"""From the journal to figures: rows with intervals, and the project's expectations compared with what was measured.

Pure functions of journal and options; nothing here knows a number that was not measured, except the targets.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from bench import check, serve, stats, strategies
from bench.harness import Journal, Options
from bench.servers import Launch
from bench.stats import Interval

REFERENCE = "majority@8"
RACE, FIRST, CLOSING = "short-3@8", "short-1@8", "vLLM n=8, closed after 3"

# The targets of the project's first milestone.
MOST_WALL = 0.67
MOST_THINKING = 0.70
LEAST_ACCURACY = -0.01
LEAST_CHAT = 0.97
MOST_START_S = 18.0


@dataclass(frozen=True, slots=True)
class StrategyRow:
    """One way to answer; token figures are per problem, ratios are to majority@8 on the same problems."""

    name: str
    problems: int
    accuracy: Interval
    thinking: Interval
    total: Interval
    wall_s: Interval
    thinking_ratio: Interval
    wall_ratio: Interval
    reported: int
    counted: int


@dataclass(frozen=True, slots=True)
class ChatRow:
    """One kind of load: tokens and requests per second, median milliseconds to the first byte of the body.

    `client_share` is the load generator's own CPU time over wall time, both servers together.
    """

    load: str
    ours: float
    vllm: float
    ratio: Interval
    ours_requests: float
    vllm_requests: float
    ours_first_ms: float
    vllm_first_ms: float
    client_share: float


@dataclass(frozen=True, slots=True)
class StartRow:
    """Seconds from process start to first answered chat."""

    server: str
    cold: float
    warm: float
    warm_low: float
    warm_high: float


@dataclass(frozen=True, slots=True)
class Expectation:
    """A target and what was measured; `met` looks at the measured value, `sure` at its whole interval."""

    name: str
    target: str
    measured: str
    met: bool
    sure: bool

    @property
    def verdict(self) -> str:
        """For people."""
        return ("met" if self.met else "missed") + ("" if self.sure else ", interval crosses the target")


def samples(journal: Journal, row: strategies.Row, problems: int, options: Options) -> list[dict[str, Any]] | None:
    """The row's chunks in order of problems; None unless all are there."""
    keys = [key for key, _, _ in strategies.schedule([row], problems, options.chunk)]
    return [journal[key] for key in keys] if all(key in journal for key in keys) else None


def column(chunks: list[dict[str, Any]], name: str) -> list[float]:
    """One figure of a row, problem by problem."""
    return [sample[name] for chunk in chunks for sample in chunk["samples"]]


def strategy_rows(journal: Journal, options: Options) -> list[StrategyRow]:
    """All rows that are complete; none without the one that the others are compared with."""
    found = {row.name: samples(journal, row, options.problems, options) for row in strategies.ROWS}
    reference = found[REFERENCE]
    if reference is None:
        return []
    return [_strategy_row(name, chunks, reference) for name, chunks in found.items() if chunks]


def _strategy_row(name: str, chunks: list[dict[str, Any]], reference: list[dict[str, Any]]) -> StrategyRow:
    correct, thinking, total, wall = (column(chunks, key) for key in ("correct", "thinking", "total", "wall_s"))
    return StrategyRow(
        name=name,
        problems=len(correct),
        accuracy=stats.wilson(round(sum(correct)), len(correct)),
        thinking=stats.mean(thinking),
        total=stats.mean(total),
        wall_s=stats.mean(wall),
        thinking_ratio=stats.paired_ratio(thinking, column(reference, "thinking")),
        wall_ratio=stats.paired_ratio(wall, column(reference, "wall_s")),
        reported=round(sum(total)),
        counted=sum(chunk["counted"] for chunk in chunks),
    )


def drift(journal: Journal, options: Options) -> Interval | None:
    """Wall time of majority@8 at the end of the run over that at its start, on the same problems."""
    again = samples(journal, strategies.DRIFT_ROW, options.drift_problems, options)
    row = next(row for row in strategies.ROWS if row.name == REFERENCE)
    before = samples(journal, row, options.problems, options)
    if again is None or before is None:
        return None
    late = column(again, "wall_s")
    return stats.paired_ratio(late, column(before, "wall_s")[: len(late)])


def chat_rows(journal: Journal, options: Options) -> list[ChatRow]:
    """All loads that were measured on both servers; the same round and repeat of both makes a pair."""
    return [row for cell in serve.cells(options) if (row := _chat_row(journal, cell))]


def _chat_row(journal: Journal, cell: serve.Cell) -> ChatRow | None:
    ours, vllm = (journal.below(f"serve/{cell.name}/{server}/") for server in serve.SERVERS)
    pairs = list(zip(ours, vllm, strict=False))
    if not pairs:
        return None
    tokens = [[side["tokens"] / side["seconds"] for side in pair] for pair in pairs]
    ours_speeds, vllm_speeds = ([pair[side] for pair in tokens] for side in (0, 1))
    return ChatRow(
        load=cell.name,
        ours=fmean(ours_speeds),
        vllm=fmean(vllm_speeds),
        ratio=stats.ratio_of_few(ours_speeds, vllm_speeds),
        ours_requests=fmean(pair[0]["requests"] / pair[0]["seconds"] for pair in pairs),
        vllm_requests=fmean(pair[1]["requests"] / pair[1]["seconds"] for pair in pairs),
        ours_first_ms=fmean(pair[0]["first_ms"] for pair in pairs),
        vllm_first_ms=fmean(pair[1]["first_ms"] for pair in pairs),
        client_share=fmean(side["client_cpu_s"] / side["seconds"] for pair in pairs for side in pair),
    )


def start_rows(journal: Journal, options: Options, launches: tuple[Launch, ...]) -> list[StartRow]:
    """Servers whose start-up was measured cold and warm."""
    rows = []
    for launch in launches:
        cold, warm = (journal.below(f"startup/{kind}/{launch.name}/") for kind in ("cold", "warm"))
        if cold and len(warm) == options.startups:
            rows.append(StartRow(launch.name, cold[0], fmean(warm), min(warm), max(warm)))
    return rows


def expectations(journal: Journal, options: Options, launches: tuple[Launch, ...]) -> list[Expectation]:
    """Every target that the journal can decide."""
    return [
        *_race(journal, options),
        *_closing(journal, options),
        *_chat(chat_rows(journal, options)),
        *_start(start_rows(journal, options, launches)),
        *_counted(strategy_rows(journal, options)),
        *_greedy(check.equal(journal)),
    ]


def _columns(journal: Journal, options: Options, name: str) -> dict[str, list[float]] | None:
    row = next(row for row in strategies.ROWS if row.name == name)
    chunks = samples(journal, row, options.problems, options)
    return {key: column(chunks, key) for key in ("correct", "thinking", "total", "wall_s")} if chunks else None


def _race(journal: Journal, options: Options) -> Iterator[Expectation]:
    race, reference = _columns(journal, options, RACE), _columns(journal, options, REFERENCE)
    if race and reference:
        wall = stats.paired_ratio(race["wall_s"], reference["wall_s"])
        thinking = stats.paired_ratio(race["thinking"], reference["thinking"])
        accuracy = stats.paired_difference(race["correct"], reference["correct"])
        yield _at_most(f"{RACE}: wall time over {REFERENCE}", wall, MOST_WALL)
        yield _at_most(f"{RACE}: thinking tokens over {REFERENCE}", thinking, MOST_THINKING)
        yield _at_least(f"{RACE}: accuracy minus {REFERENCE}", accuracy, LEAST_ACCURACY)


def _closing(journal: Journal, options: Options) -> Iterator[Expectation]:
    closing = _columns(journal, options, CLOSING)
    for name in (FIRST, RACE):
        ours = _columns(journal, options, name)
        if ours and closing:
            for key, what in (("total", "tokens"), ("wall_s", "wall time")):
                ratio = stats.paired_ratio(ours[key], closing[key])
                yield _at_most(f"{name}: {what} over the socket-closing client", ratio, 1.0)


def _chat(rows: list[ChatRow]) -> Iterator[Expectation]:
    for row in rows:
        yield _at_least(f"plain chat, {row.load}: tokens/s over vLLM's", row.ratio, LEAST_CHAT)


def _greedy(equal: tuple[int, int] | None) -> Iterator[Expectation]:
    if equal:
        same, asked = equal
        yield Expectation(
            "greedy answers equal to vLLM's server", "all", f"{same} of {asked}", same == asked, sure=True
        )


def _start(rows: list[StartRow]) -> Iterator[Expectation]:
    for row in rows:
        if row.server == "thinkserve":
            warm = Interval(row.warm, row.warm_low, row.warm_high)
            yield _at_most("start to first answer, seconds", warm, MOST_START_S)


def _counted(rows: list[StrategyRow]) -> Iterator[Expectation]:
    own = [row for row in rows if not row.name.startswith("vLLM")]
    if own:
        reported, counted = sum(row.reported for row in own), sum(row.counted for row in own)
        equal = all(row.reported == row.counted for row in own)
        yield Expectation("tokens in usage, engine's own counter", "equal", f"{reported}, {counted}", equal, sure=True)


def _at_most(name: str, measured: Interval, target: float) -> Expectation:
    met = measured.value <= target
    sure = measured.high <= target if met else measured.low > target
    return Expectation(name, f"<= {target:g}", f"{measured:.3f}", met, sure)


def _at_least(name: str, measured: Interval, target: float) -> Expectation:
    met = measured.value >= target
    sure = measured.low >= target if met else measured.high < target
    return Expectation(name, f">= {target:g}", f"{measured:.3f}", met, sure)
