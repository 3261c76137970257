"""Train the reward model, export it, evaluate it, write its card: after the two models that it needs."""

from __future__ import annotations

import argparse
import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from thinkserve.train.card import hardware
from thinkserve.train.export import known_training, log_summary
from thinkserve.train.loop import Recipe
from thinkserve.train.model import SHAPES
from thinkserve.train.prm import NAME, export, load_reward
from thinkserve.train.prm_card import write_card
from thinkserve.train.prm_chains import Chain, Task, evaluation_tasks, in_own_process, read_chains, training_tasks
from thinkserve.train.prm_eval import report, score
from thinkserve.train.prm_lesson import LessonRun
from thinkserve.train.tasks import Level

TRAINING = Recipe("large", minutes=60.0, tokens=2_600_000, batch=3072, longest=512, lr=6e-3, decay=0.7)
CHAINS = 3072
SEED = 4000  # of the evaluation's problems; the other models' begin at 1000, and 2000 to 3999 served the design
K = 8

# Who writes the chains, at which temperature, how many of six; the first mistakes of the small model matter most.
AUTHORS = (("small", 0.7, 4), ("small", 1.0, 1), ("large", 1.0, 1))


def make(options: argparse.Namespace, family: Path) -> None:
    """All of it, with the models in the folder `family`."""
    if options.device == "cpu":
        torch.set_num_threads(1)
    target = options.models / NAME
    training = known_training(target) if options.evaluate else train(options, family, target)
    if options.problems == 0:
        return
    model, tokenizer = load_reward(target)
    author = family / SHAPES["small"].name
    found = report(score(model, tokenizer, evaluation_chains(author, options)))
    found |= {"author": author.name, "parameters": sum(p.numel() for p in model.parameters())}
    write_card(target, model.shape, training, found)
    print(NAME, json.dumps(found, indent=1))


def train(options: argparse.Namespace, family: Path, target: Path) -> dict[str, Any]:
    """Training and export; the summary of the log."""
    folder, trunk = options.runs / "prm", family / SHAPES["large"].name
    tokenizer = Tokenizer.from_file(str(trunk / "tokenizer.json"))
    chains = training_chains(family, folder, options.chains)
    run = LessonRun(replace(on(TRAINING, options), start=trunk), tokenizer, folder, chains)
    run.train()
    taught = run.taught()
    export(taught.state_dict(), taught.shape, tokenizer, target)
    own = f"{len(chains):,} chains of the family's own and " if chains else ""
    return log_summary(folder / "log.jsonl") | {"hardware": hardware(), "data": f"{own}generated traces full of slips"}


def on(recipe: Recipe, options: argparse.Namespace) -> Recipe:
    """The recipe as the command line changes it: a GPU takes larger batches, as many of them."""
    more = 8 if options.device == "cuda" else 1
    larger = replace(recipe, batch=recipe.batch * more, tokens=recipe.tokens * more)
    return replace(larger, minutes=options.minutes or recipe.minutes, device=options.device)


def training_chains(family: Path, folder: Path, count: int) -> list[Chain]:
    """About `count` chains of the family's models on the training split."""
    found: list[Chain] = []
    for seed, (size, temperature, share) in enumerate(AUTHORS, 1):
        tasks = training_tasks(count * share // sum(s for *_, s in AUTHORS), seed)
        found += chains_of(family / SHAPES[size].name, tasks, folder, temperature, seed)
    return found


def evaluation_chains(author: Path, options: argparse.Namespace) -> list[Chain]:
    """K chains for each of some problems per level: of a hundred, 20 medium, 20 hard, 10 easy."""
    shares: dict[Level, int] = {"easy": 10, "medium": 5, "hard": 5}
    tasks = [
        task
        for level, part in shares.items()
        for task in evaluation_tasks(level, max(1, options.problems // part), K, SEED)
    ]
    return chains_of(author, tasks, options.runs / "prm", 0.7, SEED)


def chains_of(author: Path, tasks: list[Task], folder: Path, temperature: float, seed: int) -> list[Chain]:
    """What the model writes, from the file of earlier runs where these very weights have written it already."""
    weights = hashlib.sha256((author / "model.safetensors").read_bytes()).hexdigest()[:8]
    file = folder / f"{author.name}-{weights}-{seed}-{temperature}-{len(tasks)}.jsonl"
    if len(read_chains(file)) < len(tasks):
        in_own_process(author, tasks, file, temperature, seed)
    return read_chains(file)
