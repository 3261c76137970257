"""Problems: answers are exact by an independent reading of the question, and evaluation never meets training."""

from __future__ import annotations

import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinkserve.train.tasks import KINDS, LIMITS, STEPS, Kind, Level, Problem, evaluate, generate, problems, split_of

LEVELS: tuple[Level, ...] = ("easy", "medium", "hard")
seeds = st.integers(0, 2**32)
levels = st.sampled_from(LEVELS)


def read_chain(question: str) -> str:
    numbers = [int(n) for n in re.findall(r"\d+", question)]
    value, verbs = numbers[0], re.findall(r"(Add|Subtract|Multiply by) \d+\.", question)
    for verb, number in zip(verbs, numbers[1:], strict=True):
        value = {"Add": value + number, "Subtract": value - number, "Multiply by": value * number}[verb]
    return str(value)


def read_swaps(question: str) -> str:
    holds = dict(re.findall(r"(\w+) has the (\w+)", question))
    for a, b in re.findall(r"(\w+) and (\w+) swap\.", question):
        holds[a], holds[b] = holds[b], holds[a]
    return str(holds[question.removesuffix(" have?").rsplit(" ", 1)[1]])


def read_expression(question: str) -> str:
    shown = question.removeprefix("Compute ").removesuffix(".")
    assert re.fullmatch(r"[\d+*()-]+", shown)
    return str(eval(shown))  # noqa: S307 (nothing but digits, operators and brackets, as just checked)


READERS = {"chain": read_chain, "expression": read_expression, "swaps": read_swaps}


@given(st.sampled_from(KINDS), levels, seeds)
def test_the_answer_is_what_the_question_says(kind: str, level: Level, seed: int) -> None:
    """A reader that knows only the question's text arrives at the same answer."""
    problem = generate(next(k for k in KINDS if k == kind), level, random.Random(seed))
    assert READERS[kind](problem.question) == problem.answer
    assert problem.check(problem.answer)
    assert problem.check(f" {problem.answer} ")


@given(levels, seeds)
def test_a_wrong_answer_is_refused(level: Level, seed: int) -> None:
    """Neither a neighbour, nor nothing, nor an answer with something added passes."""
    problem = generate("chain", level, random.Random(seed))
    assert not problem.check(str(int(problem.answer) + 1))
    assert not problem.check(None)
    assert not problem.check("")
    assert not problem.check(problem.answer + "0")


@given(st.sampled_from(KINDS), levels, seeds)
def test_the_level_bounds_the_steps_and_the_numbers(kind: str, level: Level, seed: int) -> None:
    """As many steps as the level's range says; no intermediate value leaves 0..the level's limit."""
    problem = generate(next(k for k in KINDS if k == kind), level, random.Random(seed))
    low, high = STEPS[problem.kind][level]
    assert low <= len(problem.steps) <= high
    if kind != "swaps":
        assert all(0 <= int(result) <= LIMITS[level] for *_, result in problem.steps)


def test_medium_problems_have_at_least_three_operations() -> None:
    """Medium is a real multi-step problem in every kind."""
    assert all(STEPS[kind]["medium"][0] >= 3 for kind in KINDS)


@given(st.sampled_from(LEVELS), st.integers(1, 9), st.integers(0, 1000))
def test_problems_are_different_and_repeatable(level: Level, n: int, seed: int) -> None:
    """The same arguments give the same problems, all different, the kinds in turn."""
    found = problems(level, n, seed)
    assert found == problems(level, n, seed)
    assert n == len({p.question for p in found})
    assert [KINDS[i % len(KINDS)] for i in range(n)] == [p.kind for p in found]


def drawn(split: str, level: Level, n: int) -> set[str]:
    rng = random.Random(f"overlap/{split}")
    name = "train" if split == "train" else "eval"
    return {generate(KINDS[i % 3], level, rng, "train" if name == "train" else "eval").question for i in range(n)}


@pytest.mark.parametrize("level", LEVELS)
def test_training_and_evaluation_never_overlap(level: Level) -> None:
    """Every question belongs to one split by its text, so not even a small space of easy questions overlaps."""
    train, held_out = drawn("train", level, 1500), drawn("eval", level, 200)
    assert not train & held_out
    assert {"train"} == {split_of(question) for question in train}
    assert {"eval"} == {split_of(question) for question in held_out}


def test_the_split_depends_on_the_question_alone() -> None:
    """A digest, not Python's salted hash: these belong where they belonged when the models were trained."""
    chain = [f"Start with {n}. Add 5. What is the result?" for n in range(400)]
    share = sum(split_of(question) == "eval" for question in chain) / len(chain)
    assert 0.02 < share < 0.12
    assert "eval" == split_of(problems("medium", 1, 1000)[0].question)


@pytest.mark.parametrize("text", ["2**3", "a+1", "1/2", "__import__('os')", "f(1)", "1.5+1", "-(2)"])
def test_only_plain_arithmetic_is_evaluated(text: str) -> None:
    """Anything but +, -, * on whole numbers is refused."""
    with pytest.raises(ValueError, match="not an arithmetic expression"):
        evaluate(text)


@given(levels, seeds)
def test_evaluate_agrees_with_python(level: Level, seed: int) -> None:
    """Our evaluator and Python's arithmetic give the same value for generated expressions."""
    problem: Problem = generate("expression", level, random.Random(seed))
    assert str(evaluate(problem.start[0])) == read_expression(problem.question)


@given(st.sampled_from(KINDS), st.integers(1, 40), seeds)
def test_a_problem_is_as_long_as_is_asked_for(kind: Kind, steps: int, seed: int) -> None:
    """Longer than any level's, if need be, and still exact."""
    problem = generate(kind, "hard", random.Random(seed), "eval", steps=steps)
    assert steps == len(problem.steps)
    assert READERS[kind](problem.question) == problem.answer
