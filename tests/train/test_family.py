"""The recipe as a user runs it: train both models, export, evaluate, write the cards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from thinkserve.train.family import RECIPES

MODELS = Path(__file__).resolve().parents[2] / "models"
FOLDERS = ("--start", str(MODELS), "--runs", "runs", "--models", "models", "--device", "cpu", "--minutes", "0.001")


def train(cwd: Path, *options: str) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "thinkserve.train", *FOLDERS, *options]
    env = os.environ | {"TORCH_COMPILE_DISABLE": "1"}  # to compile takes longer than so few steps
    done = subprocess.run(command, check=False, cwd=cwd, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


def test_one_command_trains_both_models(tmp_path: Path) -> None:
    """A step on from the committed weights: two exported models, each with its log."""
    train(tmp_path, "--problems", "0", "--chains", "0")

    for size in RECIPES:
        name = f"arith-{size}"
        assert json.loads((tmp_path / "runs" / size / "log.jsonl").read_text().splitlines()[-1])["tokens"] > 0
        sizes = [(folder / name / "model.safetensors").stat().st_size for folder in (MODELS, tmp_path / "models")]
        assert sizes[0] == sizes[1]


def test_the_card_tells_both_trainings_and_the_evaluation(tmp_path: Path) -> None:
    """What was trained before is told with what was added, and the evaluation runs on vLLM."""
    train(tmp_path, "--only", "small", "--problems", "2")

    folder = tmp_path / "models" / "arith-small"
    report = json.loads((folder / "evaluation.json").read_text())
    before = json.loads((MODELS / "arith-small" / "evaluation.json").read_text())["training"]
    assert before == report["training"]["before"]
    assert report["medium"]["problems"] == 2
    assert f"{before['tokens']:,} tokens in" in (folder / "README.md").read_text()
