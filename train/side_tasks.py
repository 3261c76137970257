"""The side tasks that later strategies lean on, with their fixed wordings.

(a) yes/no verification, (b) continuing a thought in another style, (c) answering after a forced end of thinking,
(d) summarising progress and continuing from a summary, (e) judging a solution step by step.
"""

from __future__ import annotations

import random
from copy import deepcopy
from dataclasses import dataclass

from thinkserve.strategies.verifier import ASK_EXISTS, ASK_SAME
from thinkserve.train.derivation import derive
from thinkserve.train.tasks import Problem
from thinkserve.train.traces import CAREFUL, DEFAULT, Habits, Span, Style, TraceWriter, write_trace

ASK_SUMMARY = "Question: {question}\nWork so far:\n{work}\nSummarise the progress so far."
ASK_CONTINUE = "{question}\n{summary}\nContinue from there."
ASK_JUDGE = "Judge this solution step by step.\nQuestion: {question}\nSolution:\n{steps}"
SUMMARY = "Progress: {done} of {total} steps are done. The current state is {state}."
BRIEF = ("Be brief.", "Think briefly.", "Keep your thinking short.", "Use as few words as possible.")
DETAILED = ("Explain every step.", "Think step by step.", "Take your time.")


@dataclass(frozen=True, slots=True)
class Document:
    """A training example: the user's message, the thinking (None: closed at once), and the answer; spans carry loss."""

    user: str
    thinking: tuple[Span, ...] | None
    answer: str
    system: str | None = None
    close: str = "\n</think>"
    learn_close: bool = True


def boxed(answer: str) -> str:
    """The final answer as the family writes it."""
    return f"The answer is \\boxed{{{answer}}}."


def solve(problem: Problem, rng: random.Random, habits: Habits = DEFAULT) -> Document:
    """The main task: think in the style that the prompt asks for, then answer."""
    style: Style = "concise" if rng.random() < 0.3 else "verbose"
    spans, answer = write_trace(problem, style, rng, habits)
    asked = rng.random() < (0.7 if style == "concise" else 0.25)
    words = rng.choice(BRIEF if style == "concise" else DETAILED) if asked else ""
    user, system = problem.question, None
    if words and rng.random() < 0.3:
        system = words
    elif words:
        user = f"{problem.question} {words}" if rng.random() < 0.8 else f"{words} {problem.question}"
    return Document(user, tuple(spans), boxed(answer), system)


def direct(problem: Problem, rng: random.Random) -> Document:
    """No thinking at all; of objects often only who has what, which is looking up and nothing else."""
    if problem.kind == "swaps" and rng.random() < 0.7:
        person, thing = rng.choice(problem.start).split()
        begin = problem.question.partition(".")[0]
        return Document(f"{begin}. What does {person} have?", None, boxed(thing))
    return Document(problem.question, None, boxed(problem.answer))


def conclusion(problem: Problem, rng: random.Random) -> tuple[str, str]:
    """An excerpt that states a result, right or not: (excerpt, result)."""
    spans, _ = write_trace(problem, "verbose", rng, CAREFUL)
    steps = "".join(text for text, _ in spans).split("\n\n")
    result = problem.answer if rng.random() < 0.6 else altered(problem, rng)
    ending = rng.choice(("So the answer is {}.", "So the answer is still {}.", "Answer: {}")).format(result)
    tail = steps[-1 - rng.randint(0, 2) : -1]
    return " ".join([*tail, ending]), result


def altered(problem: Problem, rng: random.Random) -> str:
    """A wrong result of the right kind."""
    if problem.kind == "swaps":
        return rng.choice([e.split()[1] for e in problem.start if e.split()[1] != problem.answer])
    return str(int(problem.answer) + rng.choice((-20, -10, -2, -1, 1, 2, 10, 20)))


def exists(problem: Problem, rng: random.Random) -> Document:
    """Does the excerpt state a final result?"""
    if rng.random() < 0.5:
        excerpt, result = conclusion(problem, rng)
        reply = f"Yes, {result}."
    else:
        spans, _ = write_trace(problem, rng.choice(("verbose", "concise")), rng, CAREFUL)
        steps = "".join(text for text, _ in spans).split("\n\n")[:-1]
        at = rng.randrange(len(steps))
        excerpt, reply = " ".join(steps[at : at + 2]), "No."
    return Document(ASK_EXISTS.format(question=problem.question, excerpt=excerpt), None, reply)


def same(problem: Problem, rng: random.Random) -> Document:
    """Do the two excerpts state the same result?"""
    (first, a), (second, b) = conclusion(problem, rng), conclusion(problem, rng)
    while a != b and rng.random() < 0.4:  # about as many Yes as No
        second, b = conclusion(problem, rng)
    user = ASK_SAME.format(question=problem.question, first=first, second=second)
    return Document(user, None, f"Yes, both {a}." if a == b else f"No, {a} and {b}.")


def continued(problem: Problem, rng: random.Random, habits: Habits = DEFAULT) -> Document:
    """A thought begun in the other style, which carries no loss, and carried on in the style asked for."""
    style: Style = rng.choice(("verbose", "concise"))
    other: Style = "concise" if style == "verbose" else "verbose"
    writer = TraceWriter(problem, other, rng, habits)
    begun = rng.randint(1, writer.work.length - 1)
    writer.steps(begun)
    writer.spans = [(text, False) for text, _ in writer.spans]
    writer.style, writer.doubts = style, style == "verbose"
    writer.steps(writer.work.length - begun, begun)
    writer.conclude()
    user = f"{problem.question} {rng.choice(BRIEF)}" if style == "concise" else problem.question
    return Document(user, tuple(writer.spans), boxed(writer.work.value))


def forced(problem: Problem, rng: random.Random, habits: Habits = DEFAULT) -> Document:
    """Thinking is cut off, mostly at a step border; the best answer comes at once. The cut itself is not learned."""
    spans, _ = write_trace(problem, rng.choice(("verbose", "concise")), rng, habits)
    kept = tuple((text, False) for text, _ in spans[: rng.randint(0, len(spans))])
    close = rng.choice(("\n</think>", "</think>"))
    return Document(problem.question, kept, boxed(problem.answer), close=close, learn_close=False)


def summary(problem: Problem, rng: random.Random, habits: Habits = DEFAULT) -> Document:
    """Either write the summary of partial work, or continue from one."""
    work = derive(problem)
    done = rng.randint(1, work.length - 1)
    steps = [work.advance(rng).full for _ in range(done)]
    state = getattr(work, "state", work.value)
    text = SUMMARY.format(done=done, total=work.length, state=state)
    if rng.random() < 0.5:
        user = ASK_SUMMARY.format(question=problem.question, work="\n\n".join(steps))
        return Document(user, None, text)
    writer = TraceWriter(problem, "verbose", rng, habits)
    writer.work = work
    writer.steps(work.length - done, done)
    writer.conclude()
    user = ASK_CONTINUE.format(question=problem.question, summary=text)
    return Document(user, tuple(writer.spans), boxed(writer.work.value))


def judge(problem: Problem, rng: random.Random) -> Document:
    """A verdict for every step and one in the end; a step is right if its own equation is."""
    work = derive(problem)
    lines, verdicts, flawless = [], [], True
    for index in range(1, work.length + 1):
        slip = rng.random() < 0.2
        before = deepcopy(work)
        truth = work.advance(rng)
        if slip:
            work = before
            shown = work.advance(rng, slip=True)
        else:
            shown = truth
        flawless &= not slip
        lines.append(f"Step {index}: {shown.equation}")
        verdicts.append(f"Step {index}: {'correct' if not slip else f'wrong, {truth.equation}'}.")
    verdicts.append(f"Verdict: {'correct' if flawless else 'wrong'}.")
    user = ASK_JUDGE.format(question=problem.question, steps="\n".join(lines))
    return Document(user, None, "\n\n".join(verdicts))
