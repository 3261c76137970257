"""Thinking traces in two styles, with reflections that catch slips, slips that go unnoticed, and overthinking.

Slips are inserted but never taught: their tokens carry no loss, only the reaction to them does. What a trained model
gets wrong is therefore its own uncertainty. A trace is a list of spans (text, learn).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Literal

from thinkserve.train.derivation import Derivation, Step, Swaps, derive
from thinkserve.train.tasks import Problem

Style = Literal["verbose", "concise"]
Span = tuple[str, bool]

OPENINGS = (
    "Okay, let me work through this step by step.",
    "Alright, I will take this one step at a time.",
    "Let me think about this carefully.",
)
LEADS = ("First, I need to", "Next, I", "Now I", "Then I")
REDO = ("Wait, that is not right. Let me redo this step:", "Wait, I made a mistake. It should be")
CHECK = ("Wait, let me double-check that:", "Hmm, let me check this step:")
AGAIN = (
    "Wait, let me verify the whole calculation again.",
    "Hmm, let me check this from the start once more.",
    "Alternatively, I can go through everything again to be sure.",
)
QUIET = ("Once more, to be sure.", "Going through all of it one more time.")  # the same without a word of doubt


WRONG_AGAIN = 0.97  # how likely a wrong result is verified: doubt is not blind


@dataclass(frozen=True, slots=True)
class Habits:
    """Probabilities of the trace writer; `catch` is how often a slip is noticed at once.

    `again` is how likely the first, second, ... verification of a right result is; the last value stays. A greedy
    reader goes on while it is above one half.
    `quiet` is how often a verification after the first begins without a word of doubt.
    `hurry` is how often, at a step, a verbose trace goes on in the concise style; it is verified all the same.
    """

    slip: float = 0.07
    catch: float = 0.65
    check_easy: float = 0.05
    check_hard: float = 0.2
    again: tuple[float, ...] = (0.95, 0.9, 0.85, 0.75, 0.3, 0.1)
    again_slip: float = 0.01
    quiet: float = 0.0
    hurry: float = 0.03


DEFAULT = Habits()
# Doubts aloud once at most, then perhaps goes on quietly for long: chains of one problem differ much in length.
BRISK = Habits(check_easy=0.01, check_hard=0.05, again=(0.65, 0.7, 0.7, 0.6, 0.5, 0.3), quiet=0.9)
CAREFUL = Habits(slip=0.0, check_easy=0.0, check_hard=0.0, again=(0.0,), again_slip=0.0, hurry=0.0)


class TraceWriter:
    """Writes one trace for one problem."""

    def __init__(self, problem: Problem, style: Style, rng: random.Random, habits: Habits = DEFAULT) -> None:
        self.problem = problem
        self.style = style
        self.doubts = style == "verbose"
        self.rng = rng
        self.habits = habits
        self.spans: list[Span] = []
        self.work: Derivation = derive(problem)

    def say(self, text: str, learn: bool = True) -> None:
        """Append a paragraph."""
        self.spans.append((("\n\n" if self.spans else "") + text, learn))

    def write(self) -> list[Span]:
        """The whole trace: opening, steps, answer, and perhaps second thoughts."""
        if self.style == "verbose":
            opening = self.rng.choice(OPENINGS)
            if isinstance(self.work, Swaps):
                self.say(f"{opening} I have to find what {self.work.asked} has.")
                self.say(f"At the start: {self.work.state}.")
            else:
                self.say(opening)
        self.steps(self.work.length)
        self.conclude()
        return self.spans

    def steps(self, count: int, done: int = 0) -> None:
        """The next `count` steps, each with its reflection."""
        for index in range(done, done + count):
            slip = self.rng.random() < self.habits.slip
            before = deepcopy(self.work)
            step = self.work.advance(self.rng, slip)
            if self.style == "verbose" and self.rng.random() < self.habits.hurry:
                self.style = "concise"
            self.step(index, step, slip)
            if slip and self.rng.random() < self.habits.catch:
                self.work = before
                step = self.work.advance(self.rng)
                opening = self.rng.choice(REDO) if self.style == "verbose" else "Wait,"
                self.say(f"{opening} {step.full}{self.stop}")
            elif not slip and self.style == "verbose" and self.rng.random() < self.check_rate(step):
                self.say(f"{self.rng.choice(CHECK)} {step.equation}. Yes, that is correct.")

    @property
    def stop(self) -> str:
        """End of a sentence in this style."""
        return "." if self.style == "verbose" else ""

    def check_rate(self, step: Step) -> float:
        """How likely a correct step is checked."""
        return self.habits.check_hard if step.hard else self.habits.check_easy

    def step(self, index: int, step: Step, slip: bool) -> None:
        """One step; of a slip only the certain part is learned."""
        if self.style == "verbose":
            lead = LEADS[0] if index == 0 else self.rng.choice(LEADS[1:])
            words = f"{step.lead[0].upper()}{step.lead[1:]}" if isinstance(self.work, Swaps) else f"{lead} {step.lead}"
            self.say(f"{words}. So {step.given}", True)
        else:
            self.say(step.given)
        self.spans.append((f"{step.outcome}{self.stop}", not slip))

    def conclude(self) -> None:
        """State the answer; then verify, again and again, as such models do."""
        answer = self.work.value
        self.say(self.found + (f"So the answer is {answer}." if self.style == "verbose" else f"Answer: {answer}"))
        done = 0
        while self.doubts and self.rng.random() < self.doubt(answer, done):
            quiet = done and self.rng.random() < self.habits.quiet
            answer = self.verify(answer, QUIET if quiet else AGAIN)
            done += 1

    @property
    def found(self) -> str:
        """What a swaps trace says before its answer: what the person asked about holds."""
        return f"{self.work.found}. " if isinstance(self.work, Swaps) else ""

    def doubt(self, answer: str, done: int) -> float:
        """How likely a result is verified once more; a writer that never verifies does not doubt wrong results."""
        rate = self.habits.again[min(done, len(self.habits.again) - 1)]
        return max(rate, WRONG_AGAIN) if rate and answer != self.problem.answer else rate

    def verify(self, answer: str, openings: Sequence[str]) -> str:
        """Go through everything once more in short form; a disagreement leads to a careful third pass."""
        self.say(self.rng.choice(openings))
        second = self.pass_through(self.habits.again_slip)
        if second == answer:
            self.say(f"So the answer is still {answer}.")
            return answer
        self.say(f"Wait, this time I got {second} instead of {answer}. Let me check it carefully.")
        third = self.pass_through(0.0)
        self.say(f"So the answer is {third}.")
        return third

    def pass_through(self, slip_rate: float) -> str:
        """One line with all the steps; returns its result."""
        self.work = derive(self.problem)
        for index in range(self.work.length):
            slip = self.rng.random() < slip_rate
            step = self.work.advance(self.rng, slip)
            self.spans.append((("\n\n" if index == 0 else "; ") + step.given, True))
            self.spans.append((step.result, not slip))
        self.spans.append((f". {self.found}".rstrip(), True))
        return self.work.value


def write_trace(problem: Problem, style: Style, rng: random.Random, habits: Habits = DEFAULT) -> tuple[list[Span], str]:
    """A trace and the answer it arrives at."""
    writer = TraceWriter(problem, style, rng, habits)
    spans = writer.write()
    return spans, writer.work.value
