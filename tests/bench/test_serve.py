"""Load on a server: both servers get the same questions, and tokens are counted from the replies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench.client import BadReply
from bench.harness import Journal, Options, Work
from bench.serve import SERVERS, Cell, cells, measure, prompts, schedule
from bench.tasks import load
from tests.bench.fakes import FakeServer, chat

pytestmark = pytest.mark.anyio

OPTIONS = Options(model="tiny", chat_levels=(2,), chat_waves=1, chat_rounds=2)
USAGE = {"choices": [], "usage": {"completion_tokens": 7}}


def reply(body: dict[str, Any]) -> dict[str, Any] | list[dict[str, Any]]:
    """Seven tokens, streamed or not."""
    return [{"choices": []}, USAGE] if body.get("stream") else chat("x", tokens=7)


async def test_every_load_is_recorded_with_its_tokens(tmp_path: Path) -> None:
    """All cells and rounds of both servers end up in the journal; five requests of seven tokens are 35."""
    fake, journal = FakeServer(reply), Journal(tmp_path / "j")
    steps = list[None]()

    async with fake.running() as server:
        work = Work(OPTIONS, journal, lambda: steps.append(None))
        await measure(dict.fromkeys(SERVERS, server), load("easy", 20, seed=0), work)
    found = journal.below("serve/")

    assert len(found) == len(steps) == len(SERVERS) * len(cells(OPTIONS)) * OPTIONS.chat_rounds
    assert [(5, 35)] * 8 == [(one["requests"], one["tokens"]) for one in found]


def test_servers_take_turns_load_by_load() -> None:
    """The halves of a pair lie side by side, and each server begins every other round."""
    order = [(number, cell, server) for _, server, cell, number in schedule(OPTIONS)]
    pairs = [order[at : at + 2] for at in range(0, len(order), 2)]

    assert all(first[:2] == second[:2] for first, second in pairs)
    assert ["thinkserve", "thinkserve", "vllm", "vllm"] == [first[2] for first, _ in pairs]


async def test_a_finished_round_is_not_measured_again(tmp_path: Path) -> None:
    """With everything in the journal only the warm-up is sent."""
    fake, problems = FakeServer(reply), load("easy", 20, seed=0)

    async with fake.running() as server:
        for _ in range(2):
            work = Work(OPTIONS, Journal(tmp_path / "j"), lambda: None)
            await measure(dict.fromkeys(SERVERS, server), problems, work)

    assert len(fake.asked) == 2 * 2 * 5 + 8 * 5


async def test_a_stream_without_an_end_is_no_measurement(tmp_path: Path) -> None:
    """A server that fails in the middle of a stream stops the bench; it is not counted as fast."""
    fake = FakeServer(lambda body: [{"error": {"message": "overloaded"}}])

    async with fake.running() as server:
        with pytest.RaisesGroup(BadReply, flatten_subgroups=True, allow_unwrapped=True):
            work = Work(OPTIONS, Journal(tmp_path / "j"), lambda: None)
            await measure(dict.fromkeys(SERVERS, server), load("easy", 5, seed=0), work)


def test_rounds_ask_other_questions() -> None:
    """The prefix cache cannot answer the second round from the first."""
    problems = load("easy", 20, seed=0)
    first, second = (prompts(problems, Cell(2, False), number, OPTIONS) for number in (0, 1))

    assert not set(first) & set(second)
