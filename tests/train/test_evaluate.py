"""Evaluation: votes, shortest chains and intervals by hand; cards say what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from thinkserve.train.evaluate import Trial, counted, mean, pass_rate, rate, shortest, vote, wilson
from thinkserve.train.tasks import problems

MODELS = Path(__file__).resolve().parents[2] / "models"
NAMES = ("arith-large", "arith-small")
PROBLEM = problems("easy", 1, 0, kinds=("chain",))[0]
RIGHT = PROBLEM.answer


def trials(*found: tuple[str | None, int]) -> list[Trial]:
    return [Trial(PROBLEM, answer, tokens) for answer, tokens in found]


def test_the_most_frequent_answer_wins() -> None:
    """Chains without an answer have no vote."""
    assert vote(trials((RIGHT, 9), (RIGHT, 8), ("-1", 1)))
    assert not vote(trials((RIGHT, 1), ("-1", 9), ("-1", 8)))
    assert vote(trials((None, 1), (None, 2), (RIGHT, 3)))
    assert not vote(trials((None, 1), (None, 2)))


def test_a_tie_goes_to_the_shortest_chain() -> None:
    """Among equal counts the answer with the shortest chain wins."""
    assert vote(trials((RIGHT, 3), ("-1", 5), ("-1", 6), (RIGHT, 9)))
    assert not vote(trials((RIGHT, 3), ("-1", 2), ("-1", 6), (RIGHT, 9)))


def test_the_shortest_chains_are_those_that_finished() -> None:
    """A chain without an answer is never among the m shortest."""
    assert [2, 4] == [t.tokens for t in shortest(trials((None, 1), ("5", 4), ("5", 2), ("5", 7)), 2)]


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0), (0, 0, 0.0, 1.0)],
)
def test_wilson_intervals(hits: int, n: int, low: float, high: float) -> None:
    """Published values of Wilson's interval."""
    assert (low, high) == pytest.approx(wilson(hits, n), abs=1e-3)


def test_a_rate_lies_within_its_interval() -> None:
    """Value and both bounds, rounded."""
    found = rate([True, True, False, True])
    assert 0.75 == found["value"]
    assert found["low"] < 0.75 < found["high"]
    assert 2.0 == mean(trials((None, 1), (None, 3)))


def test_chains_of_one_problem_are_no_independent_draws() -> None:
    """Eight chains that agree on each of 20 problems tell no more than one chain of each does."""
    alike = [[index % 2 == 0] for index in range(20)]
    eightfold = [group * 8 for group in alike]
    assert pass_rate(alike) == pass_rate(eightfold)
    low, high = wilson(10, 20)
    found = pass_rate(eightfold)
    assert 0.5 == found["value"]
    assert (low, high) == pytest.approx((found["low"], found["high"]), abs=0.06)


def test_a_pass_rate_counts_problems_alike() -> None:
    """The value is the mean of the problems' shares; of no problem, nothing is known."""
    found = pass_rate([[True, True], [True, False], [False, False], [True, False]])
    assert 0.5 == found["value"]
    assert found["low"] < 0.5 < found["high"]
    assert {"value": 0.0, "low": 0.0, "high": 1.0} == pass_rate([])


@pytest.mark.parametrize("name", NAMES)
def test_the_card_names_the_measured_numbers(name: str) -> None:
    """Every figure of the card's table is the one of evaluation.json beside it."""
    report = json.loads((MODELS / name / "evaluation.json").read_text())
    card = (MODELS / name / "README.md").read_text()
    medium = report["medium"]
    for measure in ("greedy_pass@1", "pass@1", "majority@8", "short-1@8", "short-3@8"):
        found = medium[measure]
        assert f"| {found['value']:.3f} | {found['low']:.3f} .. {found['high']:.3f} |" in card
    assert f"{report['training']['tokens']:,} tokens" in card
    assert f"right {medium['mean_tokens_right']}, wrong {medium['mean_tokens_wrong']}" in card


@pytest.mark.parametrize(
    ("name", "level"), [("arith-small", "medium"), ("arith-small", "hard"), ("arith-large", "hard")]
)
def test_wrong_chains_are_longer_than_right_ones(name: str, level: str) -> None:
    """As measured: trouble shows in the length, where a model has trouble with all kinds of problem."""
    found = json.loads((MODELS / name / "evaluation.json").read_text())[level]
    assert found["mean_tokens_wrong"] > found["mean_tokens_right"]
    assert found["finished"] > 0.94


def test_of_a_verdict_the_first_word_counts_and_of_all_else_everything() -> None:
    """A verifier reads no further than Yes or No; an answer must be right to its end."""
    assert "Yes" == counted("Yes, both 45.") == counted("Yes")
    assert "No" == counted("No, 45 and 46.")
    assert "None of them." == counted("None of them.")
    assert "Step 1: correct." == counted("Step 1: correct.")
