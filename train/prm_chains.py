"""Chains that the family writes itself, for its reward model to learn from and to be tested on; kept in a file.

A file of chains is a cache: sampling goes on where it stopped, and a finished file is only read.
"""

from __future__ import annotations

import json
import multiprocessing
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from thinkserve.train.data import spans_of
from thinkserve.train.side_tasks import BRIEF, Document
from thinkserve.train.tasks import KINDS, Level, Problem, generate, problems

PORTION = 512  # chains sampled between two writes of the file
BRIEF_SHARE = 0.15
LEVELS: dict[Level, float] = {"easy": 0.2, "medium": 0.4, "hard": 0.4}


@dataclass(frozen=True, slots=True)
class Chain:
    """What a model wrote for a problem: `text` begins inside the think block and ends with the turn, if it did end."""

    problem: Problem
    question: str
    text: str


@dataclass(frozen=True, slots=True)
class Task:
    """A problem and how it is asked: perhaps with a request for brevity."""

    problem: Problem
    question: str


def prompt_of(question: str) -> str:
    """The chat up to where the model takes over, its thinking opened."""
    return next(spans_of(Document(question, (), "")))[0]


def training_tasks(count: int, seed: int) -> list[Task]:
    """Problems of the training split, the kinds in turn, some of them asked for brevity."""
    rng = random.Random(f"prm/{seed}")
    found = []
    for index in range(count):
        level = rng.choices(list(LEVELS), list(LEVELS.values()))[0]
        problem = generate(KINDS[index % len(KINDS)], level, rng, "train")
        words = rng.choice(BRIEF) if rng.random() < BRIEF_SHARE else ""
        found.append(Task(problem, f"{problem.question} {words}".strip()))
    return found


def evaluation_tasks(level: Level, count: int, k: int, seed: int) -> list[Task]:
    """`k` times each of `count` fresh problems of the evaluation split, one after the other."""
    return [Task(p, p.question) for p in problems(level, count, seed) for _ in range(k)]


def write_chains(author: Path, tasks: list[Task], file: Path, temperature: float, seed: int) -> None:
    """Have the model in `author` solve the tasks; appends to `file` what it does not hold yet."""
    done = len(read_chains(file))
    if done == len(tasks):
        return
    from thinkserve.train.vllm_sample import VllmSampler

    sample, tokenizer = VllmSampler(author), Tokenizer.from_file(str(author / "tokenizer.json"))
    file.parent.mkdir(parents=True, exist_ok=True)
    for at in range(done, len(tasks), PORTION):
        portion = tasks[at : at + PORTION]
        prompts = [tokenizer.encode(prompt_of(task.question), add_special_tokens=False).ids for task in portion]
        written = sample(prompts, temperature=temperature, seed=seed + at)
        with file.open("a", encoding="utf-8") as lines:
            for task, ids in zip(portion, written, strict=True):
                text = tokenizer.decode(ids, skip_special_tokens=False)
                lines.write(json.dumps(asdict(Chain(task.problem, task.question, text))) + "\n")
        print(file.name, f"{at + len(portion)} of {len(tasks)} chains", flush=True)


def in_own_process(*arguments: Any) -> None:
    """`write_chains` in a process of its own, so that its engine's memory is given back. Raises SystemExit with it."""
    process = multiprocessing.get_context("spawn").Process(target=write_chains, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(process.exitcode)


def read_chains(file: Path) -> list[Chain]:
    """The chains of a file, in order; none if it does not exist."""
    return list(_chains(file)) if file.exists() else []


def _chains(file: Path) -> Iterator[Chain]:
    for line in file.read_text(encoding="utf-8").splitlines():
        stored = json.loads(line)
        problem = stored["problem"]
        problem |= {"start": tuple(problem["start"]), "steps": tuple(map(tuple, problem["steps"]))}
        yield Chain(Problem(**problem), stored["question"], stored["text"])
