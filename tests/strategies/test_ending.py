"""Endings: where they cut in, and what they leave to the model."""

from __future__ import annotations

import pytest

from thinkserve.strategies.ending import Ending, Thought
from thinkserve.strategies.engine import Delta, Task
from thinkserve.strategies.splice import Modified, Splice
from thinkserve.strategies.testing import Recorder, ScriptedEngine

ENDINGS = [Ending("test", "mild"), Ending("test", "forced"), Ending("test", "forced", at_once=True)]


class Led(Thought):
    """A thought whose mild ending has words."""

    def lead(self) -> str:
        return "So:"


def thought(*before: str) -> tuple[Led, ScriptedEngine]:
    """A thought that has come so far."""
    engine = ScriptedEngine([""])
    task = Task(engine.encode("q<think>"), 100)
    led = Led(Modified(engine, task, Recorder()), task.job(), "")
    for text in before:
        assert led.push(Delta(engine.encode(text)), 100) is None
    return led, engine


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("text", ["</think>", "</think>8", "Yes. No.</think>8", "\n\nEnough.\n</think>"])
def test_the_models_own_end_of_thinking_is_not_taken_back(ending: Ending, text: str) -> None:
    """Nor that of a modifier below: where it is at hand, nothing of ours comes before it."""
    led, engine = thought("so it is 7.\n")
    led.end(ending)

    assert led.push(Delta(engine.encode(text)), 100) is None
    assert led.over
    assert [] == led.news()


def test_a_mild_ending_follows_the_sentence_in_which_it_was_decided() -> None:
    """What was written beyond its full stop is dropped."""
    led, engine = thought("so it is")
    led.end(ENDINGS[0])

    assert Splice(3, engine.encode("\n\nSo:")) == led.push(Delta(engine.encode(" 7.\nYes, it is.")), 100)
    assert not led.over
