"""TrimR holds back the beginning of a look while a verdict is out that may make it one too many."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest

from tests.strategies.trimming import OFF, Watched, endings, thinking, thought, trim
from thinkserve.strategies.engine import Job
from thinkserve.strategies.testing import Recorder
from thinkserve.strategies.trimr import HOLD

pytestmark = pytest.mark.anyio


class Slow(Watched):
    """A verifier that thinks about its question number `at` for so many steps of the target; None: for ever."""

    def __init__(self, script: str, at: int, steps: int | None, **more: Any) -> None:
        super().__init__(script, **more)
        self.at, self.pause, self.questions = at, steps, 0

    def generate(self, job: Job) -> Any:
        return self.late(job) if job.role == "verifier" else super().generate(job)

    @asynccontextmanager
    async def late(self, job: Job) -> Any:
        self.questions += 1
        until = self.steps + (self.pause or 0)
        while self.questions == self.at and (self.pause is None or self.steps < until):
            await anyio.lowlevel.checkpoint()
        async with super().generate(job) as stream:
            yield stream


def together(out: Recorder, engine: Watched) -> list[str]:
    """What was handed on several tokens at a time."""
    return [engine.decode(piece.tokens) for piece in out.pieces if len(piece.tokens) > 1]


@pytest.mark.parametrize("steps", [1, 10, 40])
async def test_a_look_that_was_one_too_many_is_not_in_the_text(steps: int) -> None:
    """However far it has come when the verdict is there; its tokens are paid for."""
    script = thinking("11111") + "</think>1"
    engine = Slow(script, 5, steps)
    _, out, text = await trim(engine, ending="forced", sentence="", **OFF)

    assert [("overthinking", "forced")] == endings(out)
    assert thinking("111") + "</think>1" == text.removesuffix("<eos>")
    target = sum(stream.generated for stream in engine.history if stream.job.role == "target")
    assert target >= len(out.tokens) - 1 + steps


async def test_a_look_that_is_none_too_many_comes_with_its_verdict() -> None:
    """The third result is another one: nothing is lost, and nothing waited that could not have been dropped."""
    script = thinking("112") + "Wait, all of it.</think>1"
    engine = Slow(script, 5, 20)
    _, out, text = await trim(engine, **OFF)

    assert script == text.removesuffix("<eos>")
    # Until it is clear whether a paragraph is a look at all, it may be one.
    assert ["So the answer ", "Wait, all of it."] == together(out, engine)


@pytest.mark.parametrize("opening", ["Wait, " + "and so on " * 20 + "\n\n", thought("1")])
async def test_the_reader_waits_no_longer_than_for_a_line_or_some_tokens(opening: str) -> None:
    """For a verdict that does not come."""
    script = thinking("111") + opening + "x" * 200 + "</think>1"
    engine = Slow(script, 5, None)
    _, out, text = await trim(engine, **OFF)

    held = together(out, engine)
    assert script == text.removesuffix("<eos>")
    assert HOLD + 1 >= max(map(len, held)) >= min(HOLD, len(opening.split("\n", maxsplit=1)[0]))
    assert not any("\n" in each[:-1] for each in held)


@pytest.mark.parametrize("options", [{"overthinking": False}, {"agreements": 64}])
async def test_nothing_waits_where_no_verdict_can_end_the_thinking(options: dict[str, Any]) -> None:
    """Every token is handed on as it comes."""
    engine = Slow(thinking("11111") + "</think>1", 5, 20)
    _, out, _ = await trim(engine, **OFF | {"underthinking": True} | options)

    assert [] == together(out, engine)
