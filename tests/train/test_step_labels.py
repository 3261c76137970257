"""Step labels: exact on traces whose slips are known, and on every way a chain can go wrong or right again by hand."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinkserve.train.side_tasks import boxed
from thinkserve.train.step_labels import END, label_steps, steps_of
from thinkserve.train.tasks import KINDS, LIMITS, Kind, Level, Problem, generate
from thinkserve.train.traces import Habits, Style, write_trace

kinds = st.sampled_from(KINDS)
levels = st.sampled_from(list(LIMITS))
styles = st.sampled_from(("verbose", "concise"))
seeds = st.integers(0, 2**32)

NO_SLIPS = Habits(slip=0.0, again_slip=0.0, check_easy=0.3, check_hard=0.3, hurry=0.1)
UNNOTICED = Habits(slip=0.15, catch=0.0, check_easy=0.2, check_hard=0.2, again=(0.0,))
NOTICED = Habits(slip=0.3, catch=1.0, again=(0.0,), hurry=0.1)
SECOND_THOUGHTS = Habits(slip=0.0, again=(1.0, 0.0), again_slip=0.2)


class Trace:
    """A written trace with the labels it is given, and which of its steps hold a slip."""

    def __init__(self, kind: Kind, level: Level, style: Style, seed: int, habits: Habits) -> None:
        rng = random.Random(seed)
        self.problem = generate(kind, level, rng)
        spans, self.answer = write_trace(self.problem, style, rng, habits)
        self.text = "".join(text for text, _ in spans) + "\n</think>\n\n" + boxed(self.answer) + END
        learned = [learn for text, learn in spans for _ in text]
        self.labels = [step.right for step in label_steps(self.problem, self.text)]
        self.slips, at = [], 0
        for step in steps_of(self.text):
            self.slips.append(not all(learned[at : at + len(step)]))
            at += len(step)


def first(seed: int, trace: Callable[[int], Trace], fits: Callable[[Trace], bool]) -> Trace:
    """The first trace that fits, from a seed on: few do, and Hypothesis gives up where most are thrown away."""
    return next(each for each in map(trace, count(seed)) if fits(each))


@given(kinds, levels, styles, seeds)
def test_every_step_of_a_trace_without_slips_is_right(kind: Kind, level: Level, style: Style, seed: int) -> None:
    """Checks, verification, a change of style, conclusion and answer included."""
    trace = Trace(kind, level, style, seed, NO_SLIPS)
    assert [True] * len(steps_of(trace.text)) == trace.labels


@given(kinds, levels, styles, seeds)
def test_the_steps_are_the_whole_text(kind: Kind, level: Level, style: Style, seed: int) -> None:
    """Nothing is lost between them, and what ends without a border is no step."""
    trace = Trace(kind, level, style, seed, Habits())
    assert trace.text == "".join(steps_of(trace.text))
    assert steps_of(trace.text) == steps_of(trace.text + "So the ans")


@given(kinds, styles, seeds)
def test_from_an_unnoticed_slip_on_everything_is_wrong(kind: Kind, style: Style, seed: int) -> None:
    """Steps before it are right; its own and all that build on it are wrong, checks and the answer included."""

    def slipped(trace: Trace) -> bool:
        return sum(trace.slips) == 1 and trace.answer != trace.problem.answer

    trace = first(seed, lambda each: Trace(kind, "medium", style, each, UNNOTICED), slipped)
    slip = trace.slips.index(True)
    assert [True] * slip + [False] * (len(trace.labels) - slip) == trace.labels


@given(kinds, levels, styles, seeds)
def test_only_the_slip_itself_is_wrong_when_it_is_noticed_at_once(
    kind: Kind, level: Level, style: Style, seed: int
) -> None:
    """The "Wait" that redoes it is right, and so is all that follows."""
    trace = Trace(kind, level, style, seed, NOTICED)
    assert [not slip for slip in trace.slips] == trace.labels


@given(kinds, seeds)
def test_a_wrong_verification_is_wrong_until_it_is_redone(kind: Kind, seed: int) -> None:
    """The line with the slip and the report of a disagreement are wrong; the careful third pass is right."""

    def redone(trace: Trace) -> bool:
        return any(trace.slips) and "instead of" in trace.text

    trace = first(seed, lambda each: Trace(kind, "medium", "verbose", each, SECOND_THOUGHTS), redone)
    line = trace.slips.index(True)
    assert [True] * line + [False] * 2 + [True] * (len(trace.labels) - line - 2) == trace.labels


CHAIN = Problem(
    "chain",
    "easy",
    "Start with 10. Add 5. Multiply by 2. Subtract 7. What is the result?",
    "23",
    ("10",),
    (("10", "+", "5", "15"), ("15", "*", "2", "30"), ("30", "-", "7", "23")),
)
EXPRESSION = Problem(
    "expression",
    "easy",
    "Compute (3+5)*(9-2).",
    "56",
    ("(3+5)*(9-2)",),
    (("3", "+", "5", "8"), ("9", "-", "2", "7"), ("8", "*", "7", "56")),
)
SWAPS = Problem(
    "swaps",
    "easy",
    "Ann has the cup, Bob has the key, Cid has the pen. Ann and Bob swap. Bob and Cid swap. What does Bob have?",
    "pen",
    ("Ann cup", "Bob key", "Cid pen"),
    (("Ann", "swaps", "Bob", ""), ("Bob", "swaps", "Cid", "")),
)

FIRST_SWAP = "Ann cup, Bob key become Ann key, Bob cup"
SECOND_SWAP = "Bob cup, Cid pen become Bob pen, Cid cup"

# Steps, each with + (right) or - (wrong) before it.
CHAIN_CASES = {
    "concise": ("+10+5=15", "+15*2=30", "+30-7=23", "+Answer: 23\n</think>", "+The answer is \\boxed{23}."),
    "a wrong operand": ("+10+5=15", "-15*3=45", "-45-7=38", "-Answer: 38"),
    "a wrong operation": ("+10+5=15", "-15+2=17", "-17-7=10"),
    "a step left out": ("+10+5=15", "-15-7=8", "-So the answer is 8."),
    "a step too many": ("+10+5=15", "+15*2=30", "+30-7=23", "-23-7=16", "-So the answer is 16."),
    "stops too soon": ("+10+5=15", "+15*2=30", "-So the answer is 30."),
    "a false equation, its result not used": ("+10+5=15", "-15*2=31", "+30-7=23", "+So the answer is 23."),
    "redone rightly": ("+10+5=15", "-15*2=31", "+Wait, 15*2=30", "+30-7=23"),
    "redone wrongly": ("+10+5=15", "-15*2=31", "-Wait, 15*2=40", "-40-7=33"),
    "redone twice": ("-10+5=16", "-Wait, 10+5=14", "+Wait, I made a mistake. It should be 10+5=15.", "+15*2=30"),
    "a right step suspected": ("+10+5=15", "+15*2=30", "+Wait, that is not right. Let me redo: 15*2=30.", "+30-7=23"),
    "a right step spoilt": ("+10+5=15", "-Wait, that is not right. Let me redo: 10+5=16.", "-16*2=32"),
    "repeated in silence": ("-10+5=16", "+10+5=15", "+15*2=30", "+30-7=23"),
    "a check": ("+10+5=15", "+Hmm, let me check this step: 10+5=15. Yes, that is correct.", "+15*2=30"),
    "a check that is blind": ("-10+5=16", "-Hmm, let me check this step: 10+5=16. Yes, that is correct."),
    "a right conclusion after a wrong one": ("-So the answer is 9.", "+So the answer is 23."),
    "an opening": ("+Okay, let me work.", "+10+5=15"),
    "doubt after a wrong result": (
        "-Answer: 9",
        "-Wait, let me verify it.",
        "+10+5=15; 15*2=30; 30-7=23.",
        "+Answer: 23",
    ),
    "a pass that disagrees": (
        "+Answer: 23",
        "+Wait, let me verify.",
        "-10+5=15; 15*2=31; 31-7=24.",
        "-Wait, this time I got 24 instead of 23. Let me check it carefully.",
        "+10+5=15; 15*2=30; 30-7=23.",
        "+So the answer is 23.",
    ),
    "half an equation": ("+10+5=15", "-15*2=", "-Then"),
    "a chained equation": ("-10+5=15=15",),
    "an empty box": ("-The answer is \\boxed{}.",),
}
EXPRESSION_CASES = {
    "half a bracket": ("+3+5=8, leaving 8*(9-2)", "-5)."),
    "in order": ("+Now I work out 3+5. So 3+5=8, leaving 8*(9-2).", "+9-2=7, leaving 8*7", "+8*7=56", "+Answer: 56"),
    "in another order": ("+9-2=7, leaving (3+5)*7", "+3+5=8, leaving 8*7", "+8*7=56"),
    "a bracket copied wrongly": ("-3+5=8, leaving 8*(9-3)", "-9-3=6, leaving 8*6", "-8*6=48"),
    "a true equation beside a wrong value": ("-3+5=9, leaving 9*(9-2)", "-9-2=7, leaving 9*7", "-9*7=63"),
    "not a bracket": ("-5*9=45, leaving (3+45-2)",),
    "a bracket redone": ("-3+5=9, leaving 9*(9-2)", "+Wait, 3+5=8, leaving 8*(9-2)", "+9-2=7, leaving 8*7"),
    "a check beside a wrong state": ("-3+5=8, leaving 8*(9-3)", "-Hmm, let me check: 3+5=8. Yes."),
    "one line": ("+Wait, let me verify.", "+3+5=8; 9-2=7; 8*7=56.", "+So the answer is still 56."),
    "one wrong line": ("+Wait, let me verify.", "-3+5=8; 9-2=6; 8*6=48.", "+So the answer is still 56."),
}
SWAPS_CASES = {
    "holdings": (
        "+At the start: Ann cup, Bob key, Cid pen.",
        f"+{FIRST_SWAP}. Now Ann key, Bob cup, Cid pen",
        f"+{SECOND_SWAP}. Now Ann key, Bob pen, Cid cup",
        "+Bob pen. Answer: pen\n</think>",
        "+The answer is \\boxed{pen}.",
    ),
    "a wrong start": ("-At the start: Ann cup, Bob pen, Cid key.", f"+{FIRST_SWAP}. Now Ann key, Bob cup, Cid pen"),
    "a third person forgotten": (f"-{FIRST_SWAP}. Now Ann key, Bob cup",),
    "a third person robbed": (f"-{FIRST_SWAP}. Now Ann key, Bob cup, Cid cup",),
    "nothing exchanged": ("-Ann cup, Bob key become Ann cup, Bob key. Now Ann cup, Bob key, Cid pen",),
    "the wrong pair": ("-Ann cup, Cid pen become Ann pen, Cid cup. Now Ann pen, Bob key, Cid cup",),
    "the pair the other way round": ("+Bob key, Ann cup become Bob cup, Ann key. Now Ann key, Bob cup, Cid pen",),
    "the wrong person looked up": (
        "+Wait, let me verify.",
        f"+{FIRST_SWAP}; {SECOND_SWAP}. Bob pen.",
        "-Cid cup. So the answer is cup.",
    ),
    "the wrong person after one line": ("+Wait, let me verify.", f"-{FIRST_SWAP}; {SECOND_SWAP}. Cid cup."),
    "a report without an exchange": ("-Ann key.",),
}


def labelled(problem: Problem, steps: tuple[str, ...]) -> list[str]:
    found = label_steps(problem, "".join(f"{step[1:]}\n\n" for step in steps))
    return ["-+"[step.right] + step.text.removesuffix("\n\n") for step in found]


@pytest.mark.parametrize("name", CHAIN_CASES)
def test_labels_of_chained_operations(name: str) -> None:
    """Each step gets the label written before it."""
    assert list(CHAIN_CASES[name]) == labelled(CHAIN, CHAIN_CASES[name])


@pytest.mark.parametrize("name", EXPRESSION_CASES)
def test_labels_of_expressions(name: str) -> None:
    """Each step gets the label written before it."""
    assert list(EXPRESSION_CASES[name]) == labelled(EXPRESSION, EXPRESSION_CASES[name])


@pytest.mark.parametrize("name", SWAPS_CASES)
def test_labels_of_swaps(name: str) -> None:
    """Each step gets the label written before it."""
    assert list(SWAPS_CASES[name]) == labelled(SWAPS, SWAPS_CASES[name])
