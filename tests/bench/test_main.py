"""The order of a run: servers take turns, and only what is missing is started."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import anyio
import anyio.lowlevel
import pytest

from bench import check
from bench.harness import Options
from bench.main import Bench, to_the_end

MODEL = Path(__file__).resolve().parents[2] / "models" / "arith-small"
OPTIONS = Options(model=str(MODEL), problems=3, drift_problems=2, chat_levels=(1,), chat_rounds=3, startups=1)


def test_servers_take_turns(tmp_path: Path) -> None:
    """Strategies, and the drift; then chat with both."""
    phases = list(Bench(OPTIONS, ["strategies", "serve"], tmp_path).phases())

    alone = [["thinkserve"], ["vllm"], ["thinkserve"]]
    assert [*alone, ["thinkserve", "vllm"]] == [[each.name for each in phase.launches] for phase in phases]
    assert all(phase.jobs for phase in phases)


@pytest.mark.parametrize("parts", [["strategies"], ["serve"], ["strategies", "serve"]])
def test_the_greedy_answers_of_both_servers_are_asked_for_once(tmp_path: Path, parts: list[str]) -> None:
    """Whatever is measured."""
    phases = Bench(OPTIONS, parts, tmp_path).phases()
    keys = [job.keys for phase in phases for job in phase.jobs if job.part == "check"]

    assert [(check.key("thinkserve"),), (check.key("vllm"),)] == keys


def test_a_phase_that_is_in_the_journal_is_not_missing(tmp_path: Path) -> None:
    """Once every key of a phase is recorded its server need not start."""
    run = Bench(OPTIONS, ["strategies"], tmp_path)
    first = next(run.phases())
    before = first.missing(run.journal)
    for job in first.jobs:
        for key in job.keys:
            run.journal.put(key, None)

    assert before
    assert not first.missing(run.journal)


def test_one_row_brings_its_reference_along(tmp_path: Path) -> None:
    """A single row is measured beside majority@8, and nothing else is."""
    run = Bench(OPTIONS, ["strategies"], tmp_path, rows=["short-3@8"])
    keys = {
        key.split("/")[1] for phase in run.phases() for job in phase.jobs for key in job.keys if job.part != "check"
    }

    assert {"majority@8", "short-3@8"} == keys


def test_a_terminated_run_ends_what_it_started() -> None:
    """The work is cancelled as if by hand, so its blocks are left in order; the run counts as unfinished."""
    left = []

    async def work() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            await anyio.sleep(10)
        finally:
            left.append("block")

    async def nothing() -> None:
        await anyio.lowlevel.checkpoint()

    assert not anyio.run(to_the_end, work)
    assert ["block"] == left
    assert anyio.run(to_the_end, nothing)
