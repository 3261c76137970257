"""Train the family, export it, evaluate it, write its cards; resumes after a stop.

On a CPU the two models train at the same time, one core each; on a GPU one after the other. The reward model comes
last: it begins as the large one and learns from what both write.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from thinkserve.train import prm_make
from thinkserve.train.card import hardware, write_card
from thinkserve.train.data import Curriculum, draw_document, spans_of
from thinkserve.train.evaluate import Evaluation
from thinkserve.train.export import export, known_training, load, log_summary
from thinkserve.train.loop import Recipe, Run
from thinkserve.train.model import SHAPES, default_device
from thinkserve.train.tokenizer import train_tokenizer
from thinkserve.train.vllm_sample import VllmSampler

SAMPLES = 8000
MINUTES = {"small": 50.0, "large": 95.0}  # small stops while it still errs: that is its part in the family
TIMES = {**MINUTES, "prm": prm_make.MINUTES}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m thinkserve.train", description=__doc__)
    parser.add_argument("--only", choices=[*sorted(SHAPES), "prm"], help="train one member of the family")
    parser.add_argument("--minutes", type=float, help=f"training time per model (default: {TIMES})")
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--runs", type=Path, default=Path("train/runs"), help="checkpoints and logs")
    parser.add_argument("--models", type=Path, default=Path("models"), help="where the exported models go")
    parser.add_argument("--start", type=Path, help="train on from the exported models in this folder (default: anew)")
    parser.add_argument("--problems", type=int, default=500, help="problems in the evaluation; 0: none, and no card")
    parser.add_argument(
        "--chains", type=int, default=prm_make.CHAINS, help="chains that the reward model learns from; 0: only traces"
    )
    parser.add_argument("--evaluate", action="store_true", help="no training: evaluate the exported models")
    return parser.parse_args()


def family_tokenizer(folder: Path, start: Path | None = None) -> Tokenizer:
    """The tokenizer of the runs in `folder`: that of the models in `start`, else learned once, from a fixed sample."""
    file = folder / "tokenizer.json"
    folder.mkdir(parents=True, exist_ok=True)
    if start:
        shutil.copy(start / SHAPES["small"].name / "tokenizer.json", file)
    if not file.exists():
        rng, curriculum = random.Random(0), Curriculum()
        texts = ("".join(t for t, _ in spans_of(draw_document(rng, 1.0, curriculum))) for _ in range(SAMPLES))
        train_tokenizer(texts).save(str(file))
    return Tokenizer.from_file(str(file))


def recipe(size: str, options: argparse.Namespace) -> Recipe:
    """The recipe on a device: a GPU takes larger batches, trained models a smaller learning rate that soon falls."""
    minutes = options.minutes or MINUTES[size]
    given = Recipe(size, minutes, batch=32768, device="cuda") if options.device == "cuda" else Recipe(size, minutes)
    start = options.start and options.start / SHAPES[size].name
    return replace(given, start=start, lr=3e-3, decay=0.9) if start else given


def make(size: str, options: argparse.Namespace) -> None:
    """Train, export and evaluate one model."""
    if options.device == "cpu":
        torch.set_num_threads(1)
    shape, target = SHAPES[size], options.models / SHAPES[size].name
    training = known_training(target) if options.evaluate else train(size, options, target)
    if options.problems == 0:
        return
    model, tokenizer = load(target, shape)
    report = Evaluation(VllmSampler(target), tokenizer).report(options.problems)
    report["parameters"] = sum(p.numel() for p in model.parameters())
    write_card(target, shape, training, report)
    print(shape.name, json.dumps(report, indent=1))


def train(size: str, options: argparse.Namespace, target: Path) -> dict[str, Any]:
    """Train one model to the end of its recipe and export it; the summary of its log."""
    tokenizer = family_tokenizer(options.runs, options.start)
    run = Run(recipe(size, options), tokenizer, options.runs / size)
    before = known_training(options.start / SHAPES[size].name) if options.start else None
    run.train()
    export(run.model.state_dict(), SHAPES[size], tokenizer, target)
    return log_summary(run.folder / "log.jsonl") | {"hardware": hardware(), "before": before}


def main() -> None:
    """Everything that was asked for."""
    options = arguments()
    if options.only != "prm":
        make_models(options)
    if options.only in (None, "prm"):
        prm_make.make(options, options.start if options.only and options.start else options.models)


def make_models(options: argparse.Namespace) -> None:
    """The models that write: one of them, or both."""
    if not options.evaluate:
        family_tokenizer(options.runs, options.start)
    sizes = [options.only] if options.only else sorted(SHAPES)
    if options.device != "cpu" or len(sizes) == 1:
        for size in sizes:
            make(size, options)
        return
    processes = [multiprocessing.get_context("spawn").Process(target=make, args=(size, options)) for size in sizes]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit(1)
