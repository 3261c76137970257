"""TrimR holds back the beginning of a look while a verdict is out that may make it one too many."""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import anyio
import pytest

from tests.strategies.trimming import OFF, Watched, endings, thinking, thought, trim
from thinkserve.strategies.engine import Job
from thinkserve.strategies.testing import SCRIPTED, Recorder, ScriptedEngine
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


@pytest.mark.parametrize(
    ("options", "slow"), [({"overthinking": False}, 5), ({"agreements": 64}, 5), ({"agreements": 3}, 3)]
)
async def test_nothing_waits_where_no_verdict_can_end_the_thinking(options: dict[str, Any], slow: int) -> None:
    """Every token is handed on as it comes: also while a verdict is out that would be one too few."""
    engine = Slow(thinking("112") + "x" * 200 + "</think>1", slow, 60)
    _, out, _ = await trim(engine, **OFF | {"underthinking": True} | options)

    assert [] == together(out, engine)


async def test_a_paragraph_that_is_no_look_waits_only_until_that_is_clear() -> None:
    """The verdict on the second thought is out, and can bring no more than the second agreement of three wanted."""
    engine = Slow(thinking("112") + "x" * 200 + "</think>1", 3, 90)
    _, out, _ = await trim(engine, **OFF)

    held = together(out, engine)
    assert any(each.startswith("So the answer") for each in held)
    assert all(len(each) <= 14 for each in held if not each.startswith("Wait"))


async def test_no_character_is_cut_in_two() -> None:
    """The first one of the look takes three tokens, of which the first two tell nothing."""
    script = thinking("111").replace("Wait", "等等") + "等等, once more and once more.\n\n" + "</think>1"
    engine = Slow(script, 5, 12)
    _, out, _ = await trim(engine, markers=("等等",), ending="forced", sentence="", **OFF)

    assert [("overthinking", "forced")] == endings(out)
    assert "\ufffd" not in engine.decode(out.tokens)


async def test_a_closing_tag_that_has_begun_is_not_dropped() -> None:
    """Its first token among what is held back, too: the model is at its end by itself."""
    close = ScriptedEngine([""]).encode("<!-- end -->")
    engine = Slow(f"{thinking('111')}Wait. <!-- end -->1", 5, 10, info=replace(SCRIPTED, think_close=close))
    _, out, _ = await trim(engine, **OFF)

    assert [] == endings(out)
    assert engine.decode(out.tokens).endswith("Wait. <!-- end -->1")
