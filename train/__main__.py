"""`python -m thinkserve.train`: train the family, export it, evaluate it, write its cards; resumes after a stop.

On a CPU the two models train at the same time, one core each; on a GPU one after the other.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from thinkserve.train.card import hardware, write_card
from thinkserve.train.data import Curriculum, draw_document, spans_of
from thinkserve.train.evaluate import Evaluation
from thinkserve.train.export import export, load, log_summary
from thinkserve.train.loop import Recipe, Run
from thinkserve.train.model import SHAPES
from thinkserve.train.tokenizer import train_tokenizer
from thinkserve.train.vllm_sample import VllmSampler

SAMPLES = 8000


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m thinkserve.train", description=__doc__)
    parser.add_argument("--only", choices=sorted(SHAPES), help="train one member of the family")
    parser.add_argument("--minutes", type=float, default=120.0, help="training time per model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--runs", type=Path, default=Path("train/runs"), help="checkpoints and logs")
    parser.add_argument("--models", type=Path, default=Path("models"), help="where the exported models go")
    parser.add_argument("--problems", type=int, default=500, help="problems in the evaluation")
    parser.add_argument("--evaluate", action="store_true", help="no training: evaluate the exported models")
    return parser.parse_args()


def family_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of the runs in `folder`; learned once, from a fixed sample."""
    file = folder / "tokenizer.json"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        rng, curriculum = random.Random(0), Curriculum()
        texts = ("".join(t for t, _ in spans_of(draw_document(rng, 1.0, curriculum))) for _ in range(SAMPLES))
        train_tokenizer(texts).save(str(file))
    return Tokenizer.from_file(str(file))


def recipe(size: str, minutes: float, device: str) -> Recipe:
    """The recipe on a device: a GPU takes larger batches."""
    return Recipe(size, minutes, batch=32768, device="cuda") if device == "cuda" else Recipe(size, minutes)


def make(size: str, options: argparse.Namespace) -> None:
    """Train, export and evaluate one model."""
    if options.device == "cpu":
        torch.set_num_threads(1)
    shape, target = SHAPES[size], options.models / SHAPES[size].name
    if options.evaluate:
        training = json.loads((target / "evaluation.json").read_text(encoding="utf-8"))["training"]
    else:
        training = train(size, options, target)
    model, tokenizer = load(target, shape)
    report = Evaluation(VllmSampler(target), tokenizer).report(options.problems)
    report["parameters"] = sum(p.numel() for p in model.parameters())
    write_card(target, shape, training, report)
    print(shape.name, json.dumps(report, indent=1))


def train(size: str, options: argparse.Namespace, target: Path) -> dict[str, Any]:
    """Train one model to the end of its recipe and export it; the summary of its log."""
    tokenizer = family_tokenizer(options.runs)
    run = Run(recipe(size, options.minutes, options.device), tokenizer, options.runs / size)
    run.train()
    export(run.model.state_dict(), SHAPES[size], tokenizer, target)
    return log_summary(run.folder / "log.jsonl") | {"hardware": hardware()}


def main() -> None:
    """Everything that was asked for."""
    options = arguments()
    if not options.evaluate:
        family_tokenizer(options.runs)
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


if __name__ == "__main__":
    main()
