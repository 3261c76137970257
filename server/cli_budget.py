"""The `thinkserve budget` commands: make and look at the predictor that budget guidance needs (arXiv:2506.13752).

Paths and numbers are checked before torch is imported; a mistake is one line on stderr and exit status 2.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from thinkserve.server.model_dir import ModelDir, StartError, find_model
from thinkserve.server.settings import Settings
from thinkserve.server.vllm_guidance import FOLDER
from thinkserve.server.vllm_launch import settings_for
from thinkserve.strategies.errors import ReasoningError

if TYPE_CHECKING:
    from thinkserve.guidance.run import Sampler

app = typer.Typer(help="Budget guidance: a predictor of the remaining thinking length, per model.")

Model = Annotated[str | None, typer.Argument(help="Directory or name of the model; default: the embedded one.")]
Out = Annotated[Path | None, typer.Option("--out", help="Folder of the predictor; default: budget/ of the model.")]


@app.command()
def train(
    model: Model = None,
    out: Out = None,
    traces: Annotated[
        Path | None,
        typer.Option(help="JSON lines with messages (or prompt) and completion; what lacks one the model writes."),
    ] = None,
    tasks: Annotated[
        int, typer.Option(min=0, help="Let the model work on so many problems of the embedded family instead.")
    ] = 0,
    temperature: Annotated[float, typer.Option(min=0.0, max=2.0, help="Of the traces that the model writes.")] = 0.7,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest trace that the model writes.")] = 2048,
    epochs: Annotated[int, typer.Option(min=1, help="How often every position is learned from.")] = 10,
    lr: Annotated[float, typer.Option(min=1e-6, max=1.0, help="Learning rate, constant after the warm-up.")] = 1e-3,
    batch: Annotated[int, typer.Option(min=1, help="Positions per step.")] = 256,
    close: Annotated[str, typer.Option(help="Tag that closes thinking.")] = "</think>",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    seed: Annotated[int, typer.Option(help="Of problems, traces and training.")] = 42,
) -> None:
    """Train a predictor on the model's own traces; the same command again goes on where an interrupted one stopped."""
    if (traces is None) == (tasks == 0):
        raise StartError("budget train needs --traces FILE or --tasks N")
    if traces is not None and not traces.is_file():
        raise StartError(f"No such file: {traces}")
    found = find_model(model)
    folder = _folder(found, out)
    # Without the predictor that is yet to be made.
    settings = settings_for(found, steering=False, guidance=False)
    import torch

    from thinkserve.guidance.run import BadTraces, Recipe, Source
    from thinkserve.guidance.run import train as fit

    torch.set_num_threads(threads)
    console = Console(stderr=True)
    source = Source(traces, tasks, temperature, max_tokens)
    recipe = Recipe(epochs=epochs, lr=lr, batch=batch, seed=seed)
    try:
        training = fit(found.path, folder, source, recipe, console.print, partial(_writing, settings, found), close)
    except (BadTraces, ReasoningError, OSError) as error:
        raise StartError(str(error)) from error
    _print(folder, {"model": found.path, **training})


@app.command()
def show(model: Model = None, out: Out = None) -> None:
    """Print what is known of a model's predictor."""
    found = find_model(model)
    folder = _folder(found, out)
    from thinkserve.guidance.checkpoint import BadPredictor, read_about
    from thinkserve.steering.fingerprint import fingerprint

    try:
        about = read_about(folder)
    except BadPredictor as error:
        raise StartError(str(error)) from error
    fits = "yes" if about.model == fingerprint(found.path) else "no: run `thinkserve budget train` again"
    size = about.size
    encoder = f"{size.layers} layers of width {size.width} over {size.states} states of {size.hidden}"
    facts = {"made for these weights": fits, "encoder": encoder, "vocabulary": size.vocabulary}
    _print(folder, {**facts, "tokens with a line break": len(about.newlines), **about.training})


@contextmanager
def _writing(settings: Settings, model: ModelDir, context: int) -> Iterator[Sampler]:
    """The engine at work on traces, in a context no longer than they need: a long one takes much memory."""
    from thinkserve.server.vectors_writer import started

    config = json.loads((model.path / "config.json").read_text(encoding="utf-8"))
    own = config.get("text_config", config).get("max_position_embeddings") or context
    known = [context, own, settings.max_model_len or own]
    with started(settings.model_copy(update={"max_model_len": min(known)})) as writer:

        def sample(prompts: list[list[int]], *, temperature: float, seed: int, most: int = 2048) -> list[list[int]]:
            written = writer.write(prompts, temperature=temperature, seed=seed, most=most)
            return [each.tokens for each in written]

        yield sample


def _folder(model: ModelDir, out: Path | None) -> Path:
    return out or model.path / FOLDER


def _print(folder: Path, facts: dict[str, Any]) -> None:
    table = Table.grid(padding=(0, 2))
    table.add_row("predictor", str(folder))
    for name, value in facts.items():
        if isinstance(value, dict):
            for part, number in value.items():
                table.add_row(f"{name} {part}".replace("_", " "), str(number))
        else:
            shown = timedelta(seconds=round(value)) if name == "seconds" else value
            table.add_row(name.replace("_", " "), str(shown))
    Console().print(table)
