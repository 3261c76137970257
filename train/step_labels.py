"""Exact labels for the steps of whatever the family writes for a problem: right or wrong, by replay of the derivation.

A step is the text up to and with a blank line; the last one ends with the turn. The derivation is followed alongside,
and a step is right if everything it claims holds at its place in it:

- an equation is that of the derivation's next operation (of the last one again, after "Wait" or "Hmm"), with the
  operands that the derivation has there and the true result; so what builds on a wrong value is wrong until the error
  is corrected, by a "Wait" or by a fresh pass;
- a state that is written out (what is left of an expression, who holds what) is the derivation's there; a step that
  writes none is only as right as the last one written;
- a conclusion states the problem's answer.

A step that claims nothing is as right as the step before it. A reflection without an equation opens a fresh pass.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

from thinkserve.train.derivation import INNERMOST
from thinkserve.train.tasks import OBJECTS, OPERATIONS, PEOPLE, Kind, Problem, asked_person

END = "<|im_end|>"
STEP = re.compile(rf".*?(?:\n\n|{re.escape(END)})", re.DOTALL)
REFLECTION = re.compile(r"Wait|Hmm|Alternatively")
EQUATION = re.compile(r"(-?\d+)([+*-])(-?\d+)=(-?\d+)(?:, leaving ([^\s.;]+))?")
CONCLUSION = re.compile(r"(?:answer is(?: still)?|Answer:) (?:\\boxed\{([^{}]*)\}|(-?\w+))")
REPORT = re.compile(r"Wait, this time I got \w+ instead of \w+\.")  # of two results; claims neither
PAIR = re.compile(rf"\b(?:{'|'.join(PEOPLE)}) (?:{'|'.join(OBJECTS)})\b")
CLAIM = re.compile(rf"\d|=|become|[Aa]nswer|{PAIR.pattern}")
EXCHANGE = re.compile(r"(\w+) (\w+), (\w+) (\w+) become (\w+) (\w+), (\w+) (\w+)")
HOLDINGS = re.compile(r"(?:At the start:|\bNow) (\w+ \w+(?:, \w+ \w+)*)\.?")


@dataclass(frozen=True, slots=True)
class LabelledStep:
    """A step's text, its blank line or the end of the turn included, and whether it is right."""

    text: str
    right: bool


def steps_of(text: str) -> list[str]:
    """The complete steps of a text; what is left after the last border is no step."""
    return STEP.findall(text)


def label_steps(problem: Problem, text: str) -> list[LabelledStep]:
    """The complete steps of what was written for `problem`, beginning inside the think block, each with its label."""
    reader = _Reader(problem)
    return [LabelledStep(step, reader.read(step)) for step in steps_of(text)]


class Ledger(Protocol):
    """The true derivation of a problem, followed alongside a text that may stray from it."""

    def restart(self) -> None:
        """A fresh pass begins."""
        ...

    def read(self, step: str, again: bool) -> bool | None:
        """Whether all that the step claims of the derivation holds; `again`: of its last operation. None: no claim."""
        ...


class _Reader:
    """Reads the steps of one text in order."""

    def __init__(self, problem: Problem) -> None:
        ledgers: dict[Kind, Callable[[Problem], Ledger]] = {
            "chain": ChainLedger,
            "expression": ExpressionLedger,
            "swaps": SwapsLedger,
        }
        self.problem = problem
        self.ledger = ledgers[problem.kind](problem)
        self.right = True
        self.concluded = False

    def read(self, step: str) -> bool:
        """Label of the next step."""
        reflects = REFLECTION.match(step) is not None
        passes = len(EQUATION.findall(step)) + len(EXCHANGE.findall(step))
        if passes > 1 or (passes and self.concluded and not reflects) or (reflects and not passes):
            self.ledger.restart()
        claims = [self.ledger.read(step, again=reflects and passes == 1), self._conclusion(step)]
        known = [claim for claim in claims if claim is not None]
        if known:
            self.right = all(known)
        elif CLAIM.search(step) and not REPORT.match(step):
            self.right = False  # a claim that cannot be read
        return self.right

    def _conclusion(self, step: str) -> bool | None:
        stated = [boxed or plain for boxed, plain in CONCLUSION.findall(step)]
        self.concluded = bool(stated)
        return all(map(self.problem.check, stated)) if stated else None


class ChainLedger:
    """Operations one after another; the state is the running value."""

    def __init__(self, problem: Problem) -> None:
        self._steps = problem.steps
        self._at = 0

    def restart(self) -> None:
        """Back to the start value."""
        self._at = 0

    def read(self, step: str, again: bool) -> bool | None:
        """Every equation against the operation at its place."""
        found = EQUATION.findall(step)
        self._at -= int(again and self._at > 0)
        verdicts = [self._one((left, symbol, right, result)) for left, symbol, right, result, _ in found]
        return all(verdicts) and len(found) == step.count("=") if verdicts else None

    def _one(self, equation: tuple[str, str, str, str]) -> bool:
        operations = [step[1:3] for step in self._steps]
        place = _place(operations, equation[1:3], self._at)
        self._at = place + 1
        return place < len(self._steps) and self._steps[place] == equation


def _place(operations: Sequence[Hashable], operation: Hashable, at: int) -> int:
    """Which operation is meant when `at` is due: that one, the one before it repeated, a later one; else that one."""
    due = [at, at - 1, *range(at + 1, len(operations))]
    return next((i for i in due if 0 <= i < len(operations) and operations[i] == operation), at)


class ExpressionLedger:
    """Innermost brackets replaced by their values, in any order; the state is what is left of the expression."""

    def __init__(self, problem: Problem) -> None:
        self._past = [problem.start[0]]
        self._sound = True

    def restart(self) -> None:
        """Back to the whole expression."""
        self._past, self._sound = self._past[:1], True

    def read(self, step: str, again: bool) -> bool | None:
        """Every equation against the brackets that can be worked out."""
        found = EQUATION.findall(step)
        if again and len(self._past) > 1:
            self._past.pop()
        verdicts = [self._one((left, symbol, right), result, rest) for left, symbol, right, result, rest in found]
        return all(verdicts) and len(found) == step.count("=") if verdicts else None

    def _one(self, operation: tuple[str, str, str], result: str, rest: str) -> bool:
        if len(self._past) > 1 and not _brackets(self._past[-1], operation) and _brackets(self._past[-2], operation):
            self._past.pop()  # the last one repeated without a word
        now = self._past[-1]
        meant = [after for after, _ in _brackets(now, operation)]
        others = [after for after, _ in _brackets(now)]
        after = rest if rest in meant else next(iter(meant or others), now)
        self._past.append(after)
        true = bool(meant) and int(result) == _value(operation)
        finished = not _brackets(after)
        self._sound = true and (rest == after if rest else finished or self._sound)
        return self._sound


def _value(operation: tuple[str, str, str]) -> int:
    left, symbol, right = operation
    return OPERATIONS[symbol](int(left), int(right))


def _brackets(text: str, operation: tuple[str, str, str] | None = None) -> list[tuple[str, tuple[str, str, str]]]:
    """What replacing each innermost bracket by its value would leave; only those of one operation, if given."""
    found = []
    for match in INNERMOST.finditer(text):
        left, symbol, right = (group for group in match.groups() if group is not None)
        if operation in (None, (left, symbol, right)):
            value = _value((left, symbol, right))
            found.append((f"{text[: match.start()]}{value}{text[match.end() :]}", (left, symbol, right)))
    return found


class SwapsLedger:
    """Who holds what before each swap and after the last."""

    def __init__(self, problem: Problem) -> None:
        holds = dict(entry.split() for entry in problem.start)
        self._pairs = [frozenset((a, b)) for a, _, b, _ in problem.steps]
        self._states = [dict(holds)]
        for a, _, b, _ in problem.steps:
            holds[a], holds[b] = holds[b], holds[a]
            self._states.append(dict(holds))
        self._found = re.compile(rf"(?:^|\. ){asked_person(problem)} (\w+)\.")
        self._answer = problem.answer
        self.restart()

    def restart(self) -> None:
        """Back to the start."""
        self._at, self._sound, self._before = 0, True, True

    def read(self, step: str, again: bool) -> bool | None:
        """Every exchange, the holdings written out, and what the person asked about is found to hold."""
        if again and self._at > 0:
            self._at, self._sound = self._at - 1, self._before
        exchanges = [self._exchange(match.groups()) for match in EXCHANGE.finditer(step)]
        states = [self._holds(match[1]) for match in HOLDINGS.finditer(step)]
        found = [match[1] == self._answer for match in self._found.finditer(step)]
        if not (exchanges or states or found):
            return False if PAIR.search(step) else None
        if exchanges or states:
            self._before = self._sound
            self._sound = all(exchanges) and (all(states) if states else self._sound)
        written = sum(len(PAIR.findall(match[0])) for match in (*EXCHANGE.finditer(step), *HOLDINGS.finditer(step)))
        unread = len(PAIR.findall(step)) - written - len(found)
        return all(found) and not unread and (self._sound or not (exchanges or states))

    def _exchange(self, words: tuple[str, ...]) -> bool:
        a, had_a, b, had_b, a_too, has_a, b_too, has_b = words
        place = _place(self._pairs, frozenset((a, b)), self._at)
        self._at = place + 1
        if place >= len(self._pairs) or self._pairs[place] != {a, b} or (a, b) != (a_too, b_too):
            return False
        before, after = self._states[place], self._states[place + 1]
        return (before[a], before[b], after[a], after[b]) == (had_a, had_b, has_a, has_b)

    def _holds(self, words: str) -> bool:
        entries = [entry.split() for entry in words.split(", ")]
        stated = dict(entries)
        return len(entries) == len(stated) and stated == self._states[min(self._at, len(self._pairs))]
