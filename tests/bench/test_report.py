"""The report is computed from the journal alone: verdicts follow the figures, missing parts are left out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import report, tables
from bench.harness import Journal, Options
from bench.serve import cells
from bench.servers import Launch
from bench.strategies import DRIFT_ROW, ROWS, schedule

OPTIONS = Options(model="models/tiny", problems=20, drift_problems=4, startups=2, chat_levels=(1,))
LAUNCHES = (Launch("thinkserve", ()), Launch("vllm", ()))


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    """An empty journal."""
    return Journal(tmp_path / "journal.jsonl")


def fill(journal: Journal, name: str, wall_s: float, tokens: int, right: int = 15, counted: int | None = None) -> None:
    """Record a row of 20 problems that all cost the same, the first `right` of them answered correctly."""
    row = next(row for row in (*ROWS, DRIFT_ROW) if row.name == name)
    size = OPTIONS.drift_problems if row is DRIFT_ROW else OPTIONS.problems
    for key, _, indices in schedule([row], size, OPTIONS.chunk):
        sample = {"correct": float(indices[0] < right), "total": tokens, "thinking": tokens - 10, "wall_s": wall_s}
        journal.put(key, {"samples": [sample], "counted": tokens if counted is None else counted})


def verdicts(journal: Journal) -> dict[str, bool]:
    """Name and outcome of everything that the journal decides."""
    return {one.name: one.met for one in report.expectations(journal, OPTIONS, LAUNCHES)}


@pytest.mark.parametrize(("wall_s", "met"), [(0.66, True), (0.68, False)])
def test_the_race_must_save_a_third_of_the_time(journal: Journal, wall_s: float, met: bool) -> None:
    """Met or missed follows from the measured ratio to majority@8."""
    fill(journal, "majority@8", 1.0, 1000)
    fill(journal, "short-3@8", wall_s, 600)

    assert met == verdicts(journal)["short-3@8: wall time over majority@8"]


@pytest.mark.parametrize(("right", "met"), [(15, True), (14, False)])
def test_the_race_must_not_cost_accuracy(journal: Journal, right: int, met: bool) -> None:
    """One problem of twenty is five points: more than the one that is allowed."""
    fill(journal, "majority@8", 1.0, 1000)
    fill(journal, "short-3@8", 0.5, 600, right=right)

    assert met == verdicts(journal)["short-3@8: accuracy minus majority@8"]


def test_a_usage_that_differs_from_the_counter_is_shown(journal: Journal) -> None:
    """One lost token is a missed expectation and a NO in the table."""
    fill(journal, "majority@8", 1.0, 1000, counted=1001)

    assert not verdicts(journal)["tokens in usage, engine's own counter"]
    assert "NO; 20,000 != 20,020" in tables.text(journal, OPTIONS, LAUNCHES, "today")


def test_rows_that_are_not_complete_are_left_out(journal: Journal) -> None:
    """Half a row is no row: it would not be about the same problems."""
    fill(journal, "majority@8", 1.0, 1000)
    journal.put("strategies/short-3@8/0", {"samples": [], "counted": 0})

    assert [row.name for row in report.strategy_rows(journal, OPTIONS)] == ["majority@8"]


def test_drift_compares_the_same_problems(journal: Journal) -> None:
    """The end of the run over its start, on the problems that both have."""
    fill(journal, "majority@8", 1.0, 1000)
    fill(journal, DRIFT_ROW.name, 1.1, 1000)
    found = report.drift(journal, OPTIONS)

    assert found is not None
    assert pytest.approx(1.1) == found.value


def test_chat_figures_are_tokens_over_seconds(journal: Journal) -> None:
    """Rounds and repeats of both servers pair up; the target is 97% of vLLM's speed."""
    cell = cells(OPTIONS)[0]
    for repeat, seconds in enumerate((2.0, 4.0)):
        for server, tokens in (("thinkserve", 950), ("vllm", 1000)):
            load = {
                "seconds": seconds,
                "tokens": tokens,
                "requests": 10,
                "client_cpu_s": 0.1,
                "first_ms": 5.0,
                "last_ms": 9.0,
            }
            journal.put(f"serve/{cell.name}/{server}/0.{repeat}", load)
    row = report.chat_rows(journal, OPTIONS)[0]

    assert pytest.approx((0.95, (475 + 237.5) / 2)) == (row.ratio.value, row.ours)
    assert not verdicts(journal)["plain chat, 1 plain: tokens/s over vLLM's"]


def test_start_up_is_judged_by_its_mean(journal: Journal) -> None:
    """The mean decides; the extremes are shown, and crossing the target is said."""
    journal.put("startup/cold/thinkserve/0", 25.0)
    journal.put("startup/warm/thinkserve/0", 15.0)
    journal.put("startup/warm/thinkserve/1", 19.0)
    found = next(one for one in report.expectations(journal, OPTIONS, LAUNCHES) if one.name.startswith("start"))

    assert (found.verdict, found.measured) == ("met, interval crosses the target", "17.000 [15.000, 19.000]")


def test_text_that_differs_between_servers_is_missed(journal: Journal) -> None:
    """Greedy answers are compared one by one."""
    journal.put("check/thinkserve", ["a", "b"])
    journal.put("check/vllm", ["a", "c"])

    assert not verdicts(journal)["greedy answers equal to vLLM's server"]


def test_an_empty_journal_reports_the_machine_alone(journal: Journal) -> None:
    """Nothing measured, nothing claimed; the document is still valid JSON."""
    document = json.loads(json.dumps(tables.document(journal, OPTIONS, LAUNCHES, "today")))

    assert document["options"]["model"] == "tiny"
    assert "|" not in tables.text(journal, OPTIONS, LAUNCHES, "today")
    assert (document["strategies"], document["expected"], document["drift"]) == ([], [], None)
