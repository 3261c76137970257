"""Train the family, export it, evaluate it, write its cards; resumes after a stop.

The small model is trained first, on all cores; the large one begins as the small one at twice the width; the reward
model begins as the large one and learns from what both write. On a CPU it trains beside the evaluation of the others.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from thinkserve.train import prm_make
from thinkserve.train.card import hardware, write_card
from thinkserve.train.data import Curriculum, draw_document, spans_of
from thinkserve.train.evaluate import Evaluation
from thinkserve.train.export import export, known_training, load, log_summary
from thinkserve.train.loop import Recipe, Run
from thinkserve.train.model import SHAPES, default_device
from thinkserve.train.tokenizer import train_tokenizer
from thinkserve.train.traces import BRISK
from thinkserve.train.vllm_sample import VllmSampler

SAMPLES = 8000
# The small one stops while it still errs: that is its part in the family. The large one begins with what it learned.
RECIPES = {
    "small": Recipe("small", minutes=60.0, tokens=8_500_000, batch=2048, habits=BRISK),
    "large": Recipe("large", minutes=100.0, tokens=10_000_000, lr=4e-3),
}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m thinkserve.train", description=__doc__)
    parser.add_argument("--only", choices=[*sorted(SHAPES), "prm"], help="train one member of the family")
    parser.add_argument("--minutes", type=float, help="training time per model, at most (default: by tokens)")
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


def family_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of the runs in `folder`, learned once, from a fixed sample."""
    file = folder / "tokenizer.json"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        rng, curriculum = random.Random(0), Curriculum(habits=BRISK)
        texts = ("".join(t for t, _ in spans_of(draw_document(rng, 1.0, curriculum))) for _ in range(SAMPLES))
        train_tokenizer(texts).save(str(file))
    return Tokenizer.from_file(str(file))


def recipe(size: str, options: argparse.Namespace) -> Recipe:
    """The recipe on a device: a GPU takes larger batches, trained models a smaller learning rate that soon falls."""
    given = replace(RECIPES[size], device=options.device, minutes=options.minutes or RECIPES[size].minutes)
    if options.device == "cuda":
        given = replace(given, batch=given.batch * 8, tokens=given.tokens * 4)
    if options.start:
        return replace(given, start=options.start / SHAPES[size].name, lr=3e-3, decay=0.9)
    return replace(given, half=options.models / SHAPES["small"].name) if size == "large" else given


def train(size: str, options: argparse.Namespace) -> None:
    """Train one model to the end of its recipe and export it."""
    given = recipe(size, options)
    known = given.start or given.half
    tokenizer = load(known)[1] if known else family_tokenizer(options.runs)
    run = Run(given, tokenizer, options.runs / size)
    run.train()
    export(run.model.state_dict(), run.model.shape, tokenizer, options.models / SHAPES[size].name)


def summary(size: str, options: argparse.Namespace) -> dict[str, Any]:
    """How a model was trained, and on what before."""
    name = SHAPES[size].name
    if options.evaluate:
        return known_training(options.models / name)
    half = recipe(size, options).half
    begun = {
        "before": known_training(options.start / name) if options.start else None,
        "half": half.name if half else None,
    }
    return log_summary(options.runs / size / "log.jsonl") | {"hardware": hardware()} | begun


def evaluate(size: str, options: argparse.Namespace) -> None:
    """Evaluate an exported model and write its card."""
    training, target = summary(size, options), options.models / SHAPES[size].name
    model, tokenizer = load(target)
    report = Evaluation(VllmSampler(target), tokenizer).report(options.problems)
    report["parameters"] = sum(p.numel() for p in model.parameters())
    write_card(target, model.shape, training, report)
    print(target.name, json.dumps(report, indent=1))


def reward(options: argparse.Namespace) -> None:
    """The reward model, trained and evaluated."""
    prm_make.make(options, options.start if options.only and options.start else options.models)


def main() -> None:
    """Everything that was asked for; what can be done side by side is, each in a process of its own."""
    options = arguments()
    sizes = [size for size in RECIPES if options.only in (None, size)]
    for size in () if options.evaluate else sizes:
        train(size, options)
    workers, context = 1 if options.device == "cuda" else 2, multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, max_tasks_per_child=1) as pool:
        jobs = [pool.submit(reward, options)] if options.only in (None, "prm") else []
        jobs += [pool.submit(evaluate, size, options) for size in reversed(sizes) if options.problems]
        for job in jobs:
            job.result()
