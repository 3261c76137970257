"""Rows of the strategy table: what clients send, what they count, and that a run goes on where it stopped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Fast
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from bench.harness import Journal, Options, Work
from bench.strategies import ROWS, Row, all_choices, closing, measure, schedule, strategy
from bench.tasks import Tokenizer, load
from tests.bench.fakes import FakeServer, chat

pytestmark = pytest.mark.anyio


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A folder with a tokenizer of words."""
    fast = Fast(WordLevel({"?": 0}, unk_token="?"))
    fast.pre_tokenizer = Whitespace()
    fast.save(str(tmp_path / "tokenizer.json"))
    return str(tmp_path)


def delta(index: int, content: str = "", reasoning: str = "", finish: str | None = None) -> dict[str, Any]:
    """One chunk of one choice."""
    return {
        "choices": [{"index": index, "delta": {"content": content, "reasoning": reasoning}, "finish_reason": finish}]
    }


def answers(*contents: str) -> dict[str, Any]:
    """A completion with one choice per content."""
    reply = chat(contents[0], tokens=100)
    message = {"role": "assistant", "reasoning": "hm"}
    reply["choices"] = [{"index": at, "message": message | {"content": text}} for at, text in enumerate(contents)]
    return reply


async def test_our_row_sends_the_strategy_and_reads_the_usage(model: str) -> None:
    """Name and parameters go into the body; answers of all finished chains are taken off the thinking tokens."""
    fake = FakeServer(lambda body: chat("\\boxed{4}", tokens=50, strategy={"chains": {"finished": 3}}))

    async with fake.running() as server:
        asked = await strategy("short-m-at-k", k=8, m=3)(server, {"model": "fake"}, Tokenizer(model))

    assert fake.asked[0]["strategy"] == {"name": "short-m-at-k", "params": {"k": 8, "m": 3}}
    assert (asked.content, asked.total, asked.answers) == ("\\boxed{4}", 50, 3 * 2)


async def test_the_voting_client_takes_the_most_frequent_answer(model: str) -> None:
    """Eight choices in one request, equal answers grouped by the server's own code."""
    fake = FakeServer(lambda body: answers("\\boxed{1}", "\\boxed{2}", "so \\boxed{2.0}", "none", "", "", "", ""))

    async with fake.running() as server:
        asked = await all_choices(server, {}, Tokenizer(model))

    assert fake.asked[0]["n"] == 8
    assert (asked.content, asked.total) == ("\\boxed{2}", 100)


async def test_the_closing_client_votes_over_three_and_hangs_up(model: str) -> None:
    """Three finished choices are enough: their vote decides, and the server never gets to the end of its stream."""
    chunks = [delta(5, reasoning="hm"), delta(5, "\\boxed{7}"), delta(2, "\\boxed{9}"), delta(5, finish="stop")]
    chunks += [delta(2, finish="stop"), delta(0, "\\boxed{9}", finish="stop")]
    fake = FakeServer(lambda body: chunks + [delta(1, "\\boxed{7}", finish="stop")] * 300, pause_s=0.002)

    async with fake.running() as server:
        asked = await closing(server, {}, Tokenizer(model))

    assert asked.content == "\\boxed{9}"
    assert asked.total is None
    assert fake.generated < 100


def test_rows_take_turns_on_the_same_problems() -> None:
    """Each chunk of problems is measured by every row before the next chunk, and no row always comes first."""
    plan = [(row.name, list(indices)) for _, row, indices in schedule(ROWS[:2], 5, 2)]

    assert plan == [
        ("single", [0, 1]), ("majority@8", [0, 1]), ("majority@8", [2, 3]), ("single", [2, 3]), ("single", [4]),
        ("majority@8", [4]),
    ]  # fmt: skip


async def test_a_run_goes_on_where_it_stopped(model: str, tmp_path: Path) -> None:
    """Measurements in the journal are not made again, whatever interrupted the run."""
    options = Options(model=model, problems=4)
    problems = load("easy", 4, seed=3)
    fake = FakeServer(lambda body: chat("\\boxed{0}", strategy={"chains": {"finished": 1}}))
    rows = [Row("single", "thinkserve", strategy("single"))]
    steps = list[int]()

    async with fake.running() as server:
        await measure(server, rows, problems[:2], Work(options, Journal(tmp_path / "j"), lambda: steps.append(0)))
        await measure(server, rows, problems, Work(options, Journal(tmp_path / "j"), lambda: steps.append(1)))

    assert steps == [0, 0, 1, 1]
    assert [problem.question for problem in problems] == [body["messages"][0]["content"] for body in fake.asked]
    assert len({body["seed"] for body in fake.asked}) == 4


async def test_a_chunk_records_the_engine_counter_beside_the_usage(model: str, tmp_path: Path) -> None:
    """The counter's difference covers exactly the chunk; a client without usage gets its share of it."""
    options = replace(Options(model=model), concurrency=2)
    done = [delta(index, "\\boxed{1}", finish="stop") for index in range(3)]
    fake = FakeServer(lambda body: done if "n" in body else chat("x", tokens=11, strategy={"chains": {"finished": 1}}))
    rows = [Row("ours", "thinkserve", strategy("single")), Row("closing", "vllm", closing)]
    journal = Journal(tmp_path / "j")

    async with fake.running() as server:
        await measure(server, rows, load("easy", 2, seed=0), Work(options, journal, lambda: None))
    ours, theirs = journal["strategies/ours/0"], journal["strategies/closing/0"]

    assert [ours["counted"], *(sample["total"] for sample in ours["samples"])] == [22, 11, 11]
    assert [theirs["counted"], *(sample["total"] for sample in theirs["samples"])] == [6, 3, 3]
