"""The training loop: a schedule over wall time or tokens, a JSON line of progress, and checkpoints to resume from."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from thinkserve.train.data import REFRESHER, Batcher, Curriculum
from thinkserve.train.export import load
from thinkserve.train.grow import widened
from thinkserve.train.model import SHAPES, Layer, Learner, Model, rotations
from thinkserve.train.optim import optimizers
from thinkserve.train.traces import DEFAULT, Habits


def fast_bf16(device: str) -> bool:
    """Whether the device multiplies bfloat16 in hardware; a CPU that does not is ten times slower with it."""
    return device != "cpu" or bool(torch.cpu._is_avx512_bf16_supported())


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to train one model; the run ends after `minutes` of training or `tokens`, whichever comes first.

    `start` is the folder of an exported model whose weights are trained on, `half` that of one half as wide that
    is widened to begin with; None: from scratch.
    """

    size: str
    minutes: float
    tokens: int = 10**12
    batch: int = 4096
    longest: int = 1024
    lr: float = 6e-3
    warmup: float = 0.01
    decay: float = 0.5
    seed: int = 1
    device: str = "cpu"
    start: Path | None = None
    half: Path | None = None
    habits: Habits = DEFAULT
    save_every_s: float = 120.0


class Run:
    """One training run in a folder: `last.pt` to resume from, `log.jsonl` to look at."""

    def __init__(self, recipe: Recipe, tokenizer: Tokenizer, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(recipe.seed)
        self.recipe, self.folder = recipe, folder
        self.model = self.learner().to(recipe.device)
        if recipe.device != "cpu" or shutil.which("g++"):
            for layer in (module for module in self.model.modules() if isinstance(module, Layer)):
                layer.compile(dynamic=True)
        self.optimizers = optimizers(self.model, recipe.lr)
        self.batcher = self.batches(tokenizer)
        self.angles = rotations(recipe.longest, self.model.shape.head_dim, recipe.device)
        self.step = self.tokens = 0
        self.seconds = 0.0
        if (folder / "last.pt").exists():
            self.restore(torch.load(folder / "last.pt", weights_only=False))

    def learner(self) -> Learner:
        """What is trained, as it begins."""
        recipe = self.recipe
        if recipe.start:
            return load(recipe.start)[0]
        shape = SHAPES[recipe.size]
        return widened(load(recipe.half)[0], shape) if recipe.half else Model(shape)

    def batches(self, tokenizer: Tokenizer) -> Batcher:
        """What it learns from."""
        recipe = self.recipe
        curriculum = Curriculum(habits=recipe.habits)
        if recipe.start or recipe.half:
            curriculum = replace(curriculum, begin=curriculum.end, lessons=REFRESHER if recipe.half else ())
        return Batcher(tokenizer, recipe.batch, recipe.longest, recipe.seed, curriculum)

    @property
    def progress(self) -> float:
        """Share of the run that is done, in [0, 1]."""
        return min(1.0, max(self.seconds / (self.recipe.minutes * 60), self.tokens / self.recipe.tokens))

    def rate(self) -> float:
        """Learning rate now: short warm-up, constant, then linear to zero."""
        recipe, at = self.recipe, self.progress
        return recipe.lr * min(1.0, (at + 1e-4) / recipe.warmup, max(0.01, (1 - at) / recipe.decay))

    def train(self) -> None:
        """Go on until the end; safe to interrupt at any time."""
        saved = noted = time.monotonic()
        last = saved
        value: float | None = None
        while self.progress < 1.0:
            value = self.update()
            now = time.monotonic()
            self.seconds += min(now - last, 60.0) if self.step > 1 else 0.0
            last = now
            if now - noted > 20:
                self.note(value)
                noted = now
            if now - saved > self.recipe.save_every_s:
                self.save()
                saved = now
        if value is not None:
            self.note(value)
        self.save()

    def update(self) -> float:
        """One optimiser step; returns the loss in nats per learned token."""
        ids, labels = self.batcher.batch(self.progress)
        device, (cos, sin) = self.recipe.device, self.angles
        with torch.autocast(device, dtype=torch.bfloat16, enabled=fast_bf16(device)):
            loss = self.model.loss(ids.to(device), labels.to(device), cos[: ids.shape[1]], sin[: ids.shape[1]])
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.rate()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.tokens += ids.numel()
        return float(loss.detach())

    def note(self, loss: float) -> None:
        """Append a line to the log and show it."""
        line = {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": round(self.seconds, 1),
            "progress": round(self.progress, 4),
            "loss": round(loss, 4),
            "tokens_per_s": round(self.tokens / max(self.seconds, 1e-9)),
        }
        with (self.folder / "log.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")
        print(self.folder.name, " ".join(f"{k}={v}" for k, v in line.items()), flush=True)

    def state(self) -> dict[str, Any]:
        """Everything that `restore` needs."""
        return {
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "batcher": self.batcher.state(),
            "at": (self.step, self.tokens, self.seconds),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.batcher.restore(state["batcher"])
        self.step, self.tokens, self.seconds = state["at"]

    def save(self) -> None:
        """Write the checkpoint atomically."""
        part = self.folder / "last.part"
        torch.save(self.state(), part)
        part.replace(self.folder / "last.pt")
