"""Remembered chains: what comes from the book is what was written, costs the same, and is written once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from bench.harness import Journal
from bench.inprocess import NAME, Asked, Measured, Row, measure
from bench.recorded import recorded
from bench.tasks import load
from thinkserve.server.app import create_app
from thinkserve.server.settings import Settings
from thinkserve.server.testing import ScriptedBackend
from thinkserve.strategies.engine import Job, Sampling
from thinkserve.strategies.testing import ScriptedEngine

pytestmark = pytest.mark.anyio
TEXTS = [f"thinking {'more ' * n}</think>\\boxed{{{n}}}" for n in range(8)]


async def rows(engine: ScriptedEngine, folder: Path, *counts: int) -> list[Measured]:
    app = create_app(Settings(served_name=NAME), recorded(ScriptedBackend(engine)))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
        kept, problems = Journal(folder / "journal.jsonl"), load("easy", 1, seed=0)
        strategies = [Row(str(k), {"strategy": {"name": "majority", "params": {"k": k}}}) for k in counts]
        return [await measure(client, row, problems, Asked(concurrency=1), kept) for row in strategies]


async def test_fewer_chains_are_the_first_of_more(tmp_path: Path) -> None:
    """Four of eight remembered chains cost and answer what they would have cost and answered, and nothing is run."""
    engine, fresh = ScriptedEngine(TEXTS), ScriptedEngine(TEXTS)
    many, few = await rows(engine, tmp_path / "a", 8, 4)
    assert 8 == len(engine.history)
    (alone,) = await rows(fresh, tmp_path / "b", 4)
    assert [(one.content, one.total) for one in alone.samples] == [(one.content, one.total) for one in few.samples]
    assert few.mean("total") < many.mean("total")


async def test_a_chain_that_was_left_early_is_not_remembered() -> None:
    """Half a chain is no chain."""
    engine = ScriptedEngine(TEXTS)
    job = Job(engine.encode("user: ?"), 50, Sampling(temperature=0.7), seed=3)
    backend = recorded(ScriptedBackend(engine))
    for _ in range(2):
        async with backend.engine("a").generate(job) as stream:
            async for _delta in stream:
                break
    assert 2 == len(engine.history)


async def test_a_chain_is_known_however_its_tokens_came() -> None:
    """One at a time or many: it is the same chain."""
    engine = ScriptedEngine(TEXTS)
    job = Job(engine.encode("user: ?"), 50, Sampling(temperature=0.7), seed=3)
    backend = recorded(ScriptedBackend(engine))
    for interval in (1, 16):
        async with backend.engine("a").generate(replace(job, interval=interval)) as stream:
            assert [delta async for delta in stream][-1].finish is not None
    assert 1 == len(engine.history)
