"""The loop: learns, follows its schedule, and resumes after a stop exactly where it was."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from thinkserve.train.loop import Recipe, Run
from thinkserve.train.model import SHAPES, Shape
from thinkserve.train.optim import orthogonalise

MODELS = Path(__file__).resolve().parents[2] / "models"
TOKENIZER = Tokenizer.from_file(str(MODELS / "arith-small" / "tokenizer.json"))
RECIPE = Recipe("tiny", minutes=1e9, tokens=6 * 128, batch=256, longest=128)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        SHAPES, "tiny", Shape("tiny", hidden=32, layers=1, feed_forward=48, heads=2, kv_heads=1, head_dim=16)
    )


def test_a_resumed_run_ends_with_the_same_weights(tmp_path: Path) -> None:
    """Stopping after two steps and going on in a new process gives the very weights of an unbroken run."""
    unbroken = Run(RECIPE, TOKENIZER, tmp_path / "a")
    unbroken.train()
    first = Run(RECIPE, TOKENIZER, tmp_path / "b")
    for _ in range(2):
        first.update()
    first.save()
    second = Run(RECIPE, TOKENIZER, tmp_path / "b")
    assert (first.step, first.tokens) == (second.step, second.tokens)
    second.train()
    assert unbroken.step == second.step > 2
    for name, weight in unbroken.model.state_dict().items():
        assert torch.equal(weight, second.model.state_dict()[name]), name


def test_a_finished_run_has_nothing_left_to_do(tmp_path: Path) -> None:
    """Starting it again changes nothing."""
    first = Run(RECIPE, TOKENIZER, tmp_path)
    first.train()
    again = Run(RECIPE, TOKENIZER, tmp_path)
    before = again.model.state_dict()["embed_tokens.weight"].clone()
    again.train()
    assert first.step == again.step
    assert torch.equal(before, again.model.state_dict()["embed_tokens.weight"])


def test_an_interrupted_save_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    """Half a file beside the checkpoint is never read."""
    run = Run(RECIPE, TOKENIZER, tmp_path)
    run.update()
    run.save()
    (tmp_path / "last.part").write_bytes(b"half")
    assert 1 == Run(RECIPE, TOKENIZER, tmp_path).step


def test_the_loss_falls(tmp_path: Path) -> None:
    """Thirty steps of a tiny model bring the loss well below that of a uniform guess."""
    run = Run(replace(RECIPE, tokens=10**6, batch=2048), TOKENIZER, tmp_path)
    losses = [run.update() for _ in range(30)]
    assert losses[0] > 5.5
    assert sum(losses[-5:]) / 5 < 4.8


def test_the_learning_rate_warms_up_stays_and_decays(tmp_path: Path) -> None:
    """Small, then whole, then down to a hundredth."""
    run = Run(replace(RECIPE, tokens=10_000), TOKENIZER, tmp_path)
    rates = []
    for run.tokens in (0, 1000, 4000, 7500, 10_000):
        rates.append(run.rate() / run.recipe.lr)
    assert rates[0] < 0.05
    assert [1.0, 1.0] == rates[1:3]
    assert 0.5 == pytest.approx(rates[3])
    assert 0.01 == pytest.approx(rates[4])


def test_progress_is_written_as_json_lines(tmp_path: Path) -> None:
    """Each line of the log can be read on its own and says how far the run is."""
    run = Run(RECIPE, TOKENIZER, tmp_path)
    loss = run.update()
    run.note(loss)
    run.note(loss)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [1, 1] == [line["step"] for line in lines]
    assert run.tokens == lines[0]["tokens"]
    assert round(loss, 4) == lines[0]["loss"]


@pytest.mark.parametrize("shape", [(16, 48), (48, 16), (32, 32)])
def test_a_muon_step_is_nearly_orthogonal(shape: tuple[int, int]) -> None:
    """All singular values of the direction lie near one, tall or wide."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(matrix))
    assert values.min() > 0.3
    assert values.max() < 1.3
