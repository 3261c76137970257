"""Pairs and their differences: which thoughts are compared, and with what sign."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch

from tests.steering.scripted_writer import ScriptedWriter
from thinkserve.steering.extract import (
    TEMPERATURE,
    Pair,
    differences,
    efficiency_pairs,
    given_pairs,
    own_pairs,
    sign_check,
    to_file,
    to_tensors,
)
from thinkserve.steering.model import Model
from thinkserve.steering.questions import BRIEF, Question, from_file, from_tasks, sample
from thinkserve.steering.vector_file import BadVector, parse, serialize
from thinkserve.steering.writer import Written


class Spelling:
    """Of a model its text alone: one token per letter."""

    def prompt(self, question: str) -> list[int]:
        return [ord(letter) for letter in question]

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(map(chr, tokens))


SPELLING = cast("Model", Spelling())


def scripted(scripts: dict[str, list[tuple[int, str]]]) -> ScriptedWriter:
    """Per question thoughts of given lengths and their answers, one after the other; `open` is none."""

    def write(prompt: list[int], _: float) -> Written:
        length, answer = left[SPELLING.decode(prompt)].pop(0)
        thinking = [ord("t")] * length
        return Written(thinking + [ord(letter) for letter in rf"\boxed{{{answer}}}"], thinking, answer != "open")

    left = {question: list(each) for question, each in scripts.items()}
    return ScriptedWriter(write)


def test_efficiency_pairs_are_shortest_and_longest_right_answers_to_one_question() -> None:
    """Wrong and unfinished ones are left out, and questions whose answers are of like length or right but once."""
    writer = scripted({
        "a": [(30, "1"), (10, "1"), (5, "2"), (90, "open"), (20, "1")],
        "b": [(10, "1"), (14, "1"), (9, "0"), (9, "0"), (9, "0")],
        "c": [(10, "1"), (99, "0"), (99, "0"), (99, "0"), (99, "0")],
    })  # fmt: skip
    questions = [Question(text, "1") for text in "abc"]

    pairs = efficiency_pairs(SPELLING, writer, questions, 5, 0, 100)

    assert [("a", 10, 30)] == [(SPELLING.decode(p.prompt), len(p.concise), len(p.verbose)) for p in pairs]


def test_own_pairs_differ_in_what_was_asked_and_in_nothing_else() -> None:
    """Both thoughts follow the plain question; both are right, and the brief one is shorter."""
    writer = scripted({
        "a": [(30, "1")], f"a {BRIEF}": [(10, "1")],
        "b": [(30, "1")], f"b {BRIEF}": [(10, "2")],
        "c": [(30, "1")], f"c {BRIEF}": [(30, "1")],
    })  # fmt: skip

    pairs = own_pairs(SPELLING, writer, [Question(text, "1") for text in "abc"], 7, 100)

    asked = tuple(SPELLING.prompt(f"a {BRIEF}"))
    assert [Pair(SPELLING.prompt("a"), [ord("t")] * 10, [ord("t")] * 30, asked)] == pairs
    assert [(7, TEMPERATURE, 100), (8, TEMPERATURE, 100)] == [(c.seed, c.temperature, c.most) for c in writer.calls]


def test_the_vector_points_from_verbose_to_concise(model: Model) -> None:
    """The mean over pairs of concise minus verbose, at both positions and every layer asked for."""
    pairs = [
        Pair(model.prompt(f"{n}+1"), model.encode(f"{n + 1}."), model.encode(f"So {n}+1 is {n + 1}.")) for n in range(5)
    ]

    found = differences(model, pairs, [0, 1])

    states = [(model.states(p.prompt, p.concise, [1]), model.states(p.prompt, p.verbose, [1])) for p in pairs]
    for index, position in enumerate(("last", "mean")):
        rows = torch.stack([short[index][0] - long[index][0] for short, long in states])
        difference = found[position]  # type: ignore[index]
        torch.testing.assert_close(rows.mean(0), difference.vectors[1])
        assert -1 <= difference.agreement[1] <= 1
        assert [0, 1] == list(difference.vectors)
    asked = [replace(pair, asked=tuple(model.prompt(f"{n}+1 {BRIEF}"))) for n, pair in enumerate(pairs)]
    prompts = [(model.states([], list(p.asked), [1])[0], model.states([], p.prompt, [1])[0]) for p in asked]
    prompt = torch.stack([brief[0] - plain[0] for brief, plain in prompts]).mean(0)
    assert {"last", "mean"} == set(found)
    torch.testing.assert_close(prompt, differences(model, asked, [1])["prompt"].vectors[1])
    with pytest.raises(BadVector, match="only 3 usable pairs"):
        differences(model, pairs[:3], [0])


def test_a_vector_is_stored_raw_with_its_story(model: Model) -> None:
    """The numbers come back as they were, with norm, convention and how it was made."""
    pairs = [Pair(model.prompt(str(n)), model.encode("a"), model.encode("b c")) for n in range(4)]
    difference = differences(model, pairs, [1])["last"]

    file = parse(serialize(to_file(difference, {"recipe": "asc"})))

    assert torch.equal(difference.vectors[1], to_tensors(file.layers)[1])
    assert float(difference.vectors[1].norm()) == pytest.approx(file.norms[1], rel=1e-6)
    assert {"recipe", "convention", "agreement"} == set(file.about)


@pytest.mark.parametrize(
    ("lengths", "ok"), [((5, 9, 20), True), ((20, 9, 5), False), ((9, 9, 20), False), ((5, 9, 9), False)]
)
def test_the_direction_is_checked_by_writing(lengths: tuple[int, int, int], ok: bool) -> None:
    """Adding must shorten and subtracting lengthen."""
    by_sign = dict(zip((0.5, 0.0, -0.5), lengths, strict=True))
    writer = ScriptedWriter(lambda _, scale: Written([1] * by_sign[scale], [], True))
    vectors = {1: torch.ones(2)}

    found = sign_check(writer, [[5], [6]], vectors, 0.5, 99)

    assert ok is found["ok"]
    assert {"plus": lengths[0], "zero": lengths[1], "minus": lengths[2]} == found["tokens"]
    assert [([[5], [6]], vectors, 0.0, 99)] * 3 == [(c.prompts, c.vectors, c.temperature, c.most) for c in writer.calls]


def test_given_pairs_need_both_thoughts(model: Model) -> None:
    """None missing, none empty."""
    good = Question("q", None, "short", "rather long")

    assert [Pair(model.prompt("q"), model.encode("short"), model.encode("rather long"))] == given_pairs(model, [good])
    for bad in (Question("q", None, "short"), Question("q", None, "", "long")):
        with pytest.raises(BadVector, match="q"):
            given_pairs(model, [good, bad])


def test_questions_are_read_from_a_file(tmp_path: Path) -> None:
    """What is known of each; blank lines are skipped; numbers are answers too."""
    file = tmp_path / "questions.jsonl"
    file.write_text('{"question": "a", "answer": 4}\n\n{"question": "b", "concise": "c", "verbose": "v", "more": 1}\n')

    assert [Question("a", "4"), Question("b", None, "c", "v")] == from_file(file)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "no question"),
        ("{}", "line 1"),
        ('{"question": "a"}\nnope', "line 2"),
        ('{"question": 5}', "question must be text"),
        ('{"question": "a", "answer": []}', "answer must be text"),
        ("[1]", "line 1"),
    ],
)
def test_a_file_of_something_else_is_told_with_its_line(content: str, words: str, tmp_path: Path) -> None:
    """One sentence for whoever wrote the file."""
    file = tmp_path / "questions.jsonl"
    file.write_text(content)

    with pytest.raises(BadVector, match=words):
        from_file(file)
    with pytest.raises(BadVector, match="cannot read"):
        from_file(tmp_path / "none")


def test_generated_questions_know_their_answers() -> None:
    """Those for measuring are never among those for making."""
    made, held = (from_tasks("easy", 20, 0, held_out=held_out) for held_out in (False, True))

    assert all(q.check(rf"so \boxed{{9}}, no: \boxed{{{q.answer}}}") for q in made)
    assert not any(q.check(rf"\boxed{{{q.answer}}} \boxed{{x}}") or q.check("") for q in made)
    assert set() == {q.text for q in made} & {q.text for q in held}
    assert sample(made, 5, 1) == sample(made, 5, 1) != sample(made, 5, 2)
    with pytest.raises(BadVector, match="easy, medium, hard"):
        from_tasks("huge", 1, 0, held_out=True)
    assert json.dumps([q.answer for q in made])
