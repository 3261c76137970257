"""How families of reward models read a path: longer paths begin as shorter ones do, and each step has its place."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path as File

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinkserve.server.model_dir import ModelDir, StartError
from thinkserve.server.reward_formats import FORMATS, Format, format_of, is_reward_model, right, sigmoid
from thinkserve.strategies.engine import Path, Tokens

BY_NAME = {each.name: each for each in FORMATS}
STEPS = st.lists(st.text("ab \n", max_size=6), min_size=1, max_size=5)


def encode(text: str) -> Tokens:
    """One token per character, the marker of Qwen's family one as well."""
    return tuple(1 if each == "\0" else ord(each) for each in text.replace("<extra_0>", "\0"))


@given(st.sampled_from(FORMATS), STEPS)
def test_a_longer_path_begins_with_the_tokens_of_the_shorter(form: Format, steps: list[str]) -> None:
    """Else the prefix cache would find nothing; the reward of a step stands in the same place in both."""
    whole = form.read((7, 8), Path(tuple(steps)), encode)
    for length in range(len(steps) + 1):
        part = form.read((7, 8), Path(tuple(steps[:length])), encode)
        assert part.tokens == whole.tokens[: len(part.tokens)]
        assert part.ends == whole.ends[:length]


def test_our_own_family_reads_steps_as_they_were_written() -> None:
    """Nothing is inserted: a solver's tokens are the reward model's tokens."""
    read = BY_NAME["thinkserve"].read((7,), Path(("a\n\n", "b</think>\n\nc")), encode)

    assert (7, *encode("a\n\nb</think>\n\nc")) == read.tokens
    assert (3, len(read.tokens) - 1) == read.ends


def test_qwens_family_marks_the_end_of_each_step() -> None:
    """Behind the text, without its blank lines; the reward stands at the marker."""
    read = BY_NAME["qwen2.5-math-prm"].read((7,), Path(("a\n\n", "b")), encode)

    assert (7, ord("a"), 1, ord("b"), 1) == read.tokens
    assert (2, 4) == read.ends
    assert ["system", "user"] == [each["role"] for each in BY_NAME["qwen2.5-math-prm"].messages("q")]


def test_skyworks_family_has_a_line_per_step() -> None:
    """And no chat: the question stands on the first line."""
    form = BY_NAME["skywork-o1-prm"]

    assert (*encode("a\nb\n"),) == form.read((), Path(("a\n\n", "b\n\n")), encode).tokens
    assert form.plain is not None
    assert "<s>1 + 1\n" == form.plain("<s>", "1 + 1")


def merging(text: str) -> Tokens:
    """As `encode`, but a full stop and the line breaks behind it are one token, as Qwen's pre-tokenizer has them."""
    parts = re.findall(r"\.\n+|.", text.replace("<extra_0>", "\0"), re.DOTALL)
    return tuple(1 if part == "\0" else ord(part) if len(part) == 1 else 1000 + len(part) for part in parts)


def test_the_reward_stands_at_a_line_break_of_its_own() -> None:
    """Whatever ends the step: a line break that is part of another token is none the model was trained to rate at."""
    read = BY_NAME["skywork-o1-prm"].read((7,), Path(("1 + 1 = 2.\n\n", "So\n2.\n")), merging)

    assert (7, *encode("1 + 1 = 2.\nSo\n2.\n")) == read.tokens
    assert [ord("\n")] * 2 == [read.tokens[end] for end in read.ends]
    assert 1000 + 2 in merging("2.\n")


def test_line_breaks_within_a_step_stand_alone_as_well() -> None:
    """As in the family's own code, which cuts a solution at every one; the step has one reward, at its end."""
    read = BY_NAME["skywork-o1-prm"].read((), Path(("a.\nb.\n\nc.",)), merging)

    assert encode("a.\nb.\n\nc.\n") == read.tokens
    assert (len(read.tokens) - 1,) == read.ends


@given(STEPS, st.integers(0, 40))
def test_what_does_not_fit_is_cut_at_the_end_of_a_step(steps: list[str], context: int) -> None:
    """The steps that fit keep their rewards."""
    whole = BY_NAME["thinkserve"].read((7, 8), Path(tuple(steps)), encode)
    part = whole.within(context)

    assert len(part.tokens) <= context
    assert part.ends == tuple(end for end in whole.ends if end < context)
    assert part.tokens == whole.tokens[: len(part.tokens)]
    assert not part.ends or part.ends[-1] == len(part.tokens) - 1


@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6))
def test_a_reward_is_a_probability(one: float, other: float) -> None:
    """Of the label that means right; both labels together are sure."""
    assert 0 <= right((one, other)) <= 1
    assert pytest.approx(1) == right((one, other)) + right((other, one))
    assert (right((one, other)) > 0.5) == (other > one) or abs(one - other) < 1e-9


def test_what_is_no_number_stays_none() -> None:
    """A search treats it as the worst."""
    assert math.isnan(right((math.nan, 1.0)))
    assert math.isnan(sigmoid((math.nan,)))


def folder(path: File, architecture: str, **content: str) -> ModelDir:
    if content:
        (path / "reward.json").write_text(json.dumps(content))
    return ModelDir(path, architecture, 1)


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        ("Qwen3ForTokenClassification", "thinkserve"),
        ("Qwen2ForProcessRewardModel", "qwen2.5-math-prm"),
        ("Qwen2ForPrmModel", "skywork-o1-prm"),
    ],
)
def test_the_architecture_tells_the_family(architecture: str, name: str, tmp_path: File) -> None:
    """Published models need no file of ours."""
    assert name == format_of(folder(tmp_path, architecture)).name


def test_a_file_beside_the_weights_tells_it_better(tmp_path: File) -> None:
    """An architecture of its own may be read like another's."""
    model = folder(tmp_path, "LlamaForTokenClassification", format="qwen2.5-math-prm")

    assert is_reward_model(model)
    assert "qwen2.5-math-prm" == format_of(model).name


def test_what_is_not_known_is_told_with_what_is(tmp_path: File) -> None:
    """In one line each."""
    with pytest.raises(StartError, match="is no process reward model; known are Qwen3For"):
        format_of(folder(tmp_path, "Qwen3ForCausalLM"))
    with pytest.raises(StartError, match=r"unknown format 'x'; known are thinkserve"):
        format_of(folder(tmp_path, "Qwen3ForCausalLM", format="x"))
    (tmp_path / "reward.json").write_text("{")
    with pytest.raises(StartError, match="Cannot read"):
        format_of(ModelDir(tmp_path, "Qwen3ForCausalLM", 1))
