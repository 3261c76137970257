"""From a model's folder to its predictor's: traces, training, check, files; resumable at every stage."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from thinkserve.guidance.checkpoint import LAM_MIN, About, save
from thinkserve.guidance.fit import Fit, Recipe
from thinkserve.guidance.traces import BadTraces, Trace, Words, completed, read, tasks, write
from thinkserve.steering.fingerprint import fingerprint
from thinkserve.train.evaluate import Sampler

WRITTEN, UNFINISHED = "traces.jsonl", "last.pt"
CHUNK = 500  # traces written between two saves
SAVE_EVERY_S = 60.0
SAY_EVERY_S = 10.0

Say = Callable[[str], None]
# The model at work within a context of so many tokens, for as long as it has something to write.
Writing = Callable[[int], AbstractContextManager[Sampler]]


@dataclass(frozen=True, slots=True)
class Source:
    """Where traces come from: a file, or `tasks` problems of the embedded family; sampled where they lack an answer."""

    file: Path | None = None
    tasks: int = 0
    temperature: float = 0.7
    most: int = 2048


def train(
    model: Path, out: Path, source: Source, recipe: Recipe, say: Say, writing: Writing, close: str = "</think>"
) -> dict[str, Any]:
    """Make the predictor of `model` in `out`; returns what its file says of the training. Raises BadTraces, OSError.

    `writing` starts the model where traces have to be written. What an interrupted call has left in `out` is used, if
    it was made with the same settings, and removed at the end.
    """
    out.mkdir(parents=True, exist_ok=True)
    words = Words(model, close)
    mark = fingerprint(model)
    traces = _traces(out, source, recipe, words, mark)
    _complete(traces, out / WRITTEN, source, recipe, say, writing)
    fit = Fit(model, traces, recipe, words.close, words.newlines(_vocabulary(model)))
    unfinished = out / UNFINISHED
    if unfinished.exists():
        fit.restore(torch.load(unfinished, map_location="cpu", weights_only=True))
        say(f"going on at step {fit.step} of {fit.steps}")
    _fit(fit, unfinished, say)
    check = fit.check()
    training = {
        **asdict(recipe), "traces_used": len(fit.traces), "steps": fit.steps, "seconds": round(fit.seconds, 1),
        "parameters": sum(p.numel() for p in fit.predictor.parameters()), "held_out_check": check,
    }  # fmt: skip
    size = fit.predictor.size
    save(
        out,
        fit.predictor,
        About(size, words.close, words.newlines(size.vocabulary), mark, min(LAM_MIN, check["rate_1%"]), training),
    )
    for name in (UNFINISHED, WRITTEN, f"{WRITTEN}.json"):
        (out / name).unlink(missing_ok=True)
    return training


def _vocabulary(model: Path) -> int:
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    return int(config.get("vocab_size") or config["text_config"]["vocab_size"])


def _traces(out: Path, source: Source, recipe: Recipe, words: Words, mark: str) -> list[Trace]:
    """The source's traces, those that an interrupted call has written among them."""
    kept, about = out / WRITTEN, out / f"{WRITTEN}.json"
    asked = {"file": _content(source.file), "tasks": source.tasks, "temperature": source.temperature,
             "most": source.most, "seed": recipe.seed, "model": mark}  # fmt: skip
    if not about.exists() or json.loads(about.read_text(encoding="utf-8")) != asked:
        if (out / UNFINISHED).exists():
            raise BadTraces(f"an unfinished training on other traces is there: {out / UNFINISHED}")
        # What was written for another model or under other settings goes before anybody may take it for this one's.
        kept.unlink(missing_ok=True)
        about.write_text(json.dumps(asked), encoding="utf-8")
    if kept.exists():
        return read(kept, words)
    return read(source.file, words) if source.file else tasks(source.tasks, words, recipe.seed)


def _complete(traces: list[Trace], kept: Path, source: Source, recipe: Recipe, say: Say, writing: Writing) -> None:
    """Let the model write what lacks a completion; what it has written is in `kept` after every chunk."""
    lacking = [len(trace.prompt) for trace in traces if trace.completion is None]
    if not lacking:
        return
    with writing(max(lacking) + source.most) as sampler:
        for at in range(0, len(traces), CHUNK):
            part = traces[at : at + CHUNK]
            if any(trace.completion is None for trace in part):
                seed = recipe.seed + at
                written = completed(part, sampler, temperature=source.temperature, most=source.most, seed=seed)
                traces[at : at + CHUNK] = written
                write(kept, traces)
                say(f"the model has written {min(at + CHUNK, len(traces))} of {len(traces)} traces")


def _content(file: Path | None) -> str | None:
    return None if file is None else sha256(file.read_bytes()).hexdigest()


def _fit(fit: Fit, unfinished: Path, say: Say) -> None:
    said = saved = time.monotonic()
    mean, seen, first, began = 0.0, 0, 0, said
    for loss in fit.train():
        mean, seen = mean + loss, seen + 1
        now = time.monotonic()
        if not first:
            # The states were computed before this step.
            first, began = fit.step, now
        if now - said > SAY_EVERY_S or fit.step == fit.steps:
            left = (now - began) / max(1, fit.step - first) * (fit.steps - fit.step)
            say(f"step {fit.step}/{fit.steps}  {mean / seen:+.3f} nats per position  {left / 60:.1f} minutes left")
            said, mean, seen = now, 0.0, 0
        if now - saved > SAVE_EVERY_S:
            _save(fit, unfinished)
            saved = now


def _save(fit: Fit, unfinished: Path) -> None:
    part = unfinished.with_suffix(".part")
    torch.save(fit.state(), part)
    part.replace(unfinished)


__all__ = ["BadTraces", "Recipe", "Sampler", "Source", "train"]
