"""Forced answers of races in which nobody finished: only where the request may still write them."""

from __future__ import annotations

import anyio
import pytest

from thinkserve.server.limits import LimitedEngine
from thinkserve.strategies.engine import Answer, Task
from thinkserve.strategies.settle import FORCED, UNFORCED
from thinkserve.strategies.testing import Recorder, ScriptedEngine, play

LONG = "t" * 500 + "</think>it is 7."
PROMPT = ScriptedEngine([]).encode("q<think>")


@pytest.mark.parametrize(("total", "forced"), [(80, False), (85, False), (90, True)])
def test_nothing_is_forced_that_the_request_has_no_tokens_for(total: int, forced: bool) -> None:
    """Two chains of forty have written eighty: the longest goes out whole, or gives way to a whole answer."""
    engine = ScriptedEngine([LONG])
    task = Task(PROMPT, 40, max_total_tokens=total)

    answer, out = anyio.run(lambda: play("majority", engine, task, k=2))

    assert ("t" * 29 + "it is 7." if forced else "t" * 40) == engine.decode(answer.tokens)
    assert forced == ("budget.forced" in [event.type for event in out.events]) == (FORCED in answer.warnings)


def test_an_answer_that_was_not_forced_in_time_is_not_told_of() -> None:
    """The request ends before the forced job's first token, for a reason that could not be known before."""
    engine = ScriptedEngine([LONG])

    async def go() -> tuple[Answer, Recorder]:
        with LimitedEngine(engine, 80, None) as limited:
            return await play("majority", limited, Task(PROMPT, 40), k=2)

    answer, out = anyio.run(go)

    assert ("budget", (), (UNFORCED,)) == (answer.stopped_by, out.tokens_of("answer"), answer.warnings)
