"""`thinkserve vectors`: make steering vectors, find their strength, look at them. Nothing slow before it is needed.

These commands work on the folder; a running server has read it at start and is changed through its own routes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from thinkserve.server.errors import clean
from thinkserve.server.model_dir import ModelDir, StartError, find_model
from thinkserve.server.settings import Settings
from thinkserve.server.validation import nearest
from thinkserve.server.vectors import (
    Shape,
    SteeringVector,
    VectorRegistry,
    check_name,
    read_vector,
    remove_files,
    shape_of,
    vector_files,
    vectors_folder,
)
from thinkserve.server.vllm_launch import settings_for
from thinkserve.steering.vector_file import BadVector
from thinkserve.strategies.errors import ReasoningError

GPU_SHARE = 0.5  # of a GPU's memory, for the engine

app = typer.Typer(help="Steering vectors: extract them, calibrate their strength, list, show and remove them.")


class Recipe(StrEnum):
    """How a vector is made."""

    asc = "asc"
    efficiency = "efficiency"


NAME = Annotated[str, typer.Argument(help="Name of the vector.")]
MODEL = Annotated[str | None, typer.Option(help="Directory or name of the model; default: the embedded one.")]
FOLDER = Annotated[Path | None, typer.Option(help="Folder of the vectors; default: vectors/ in the model's.")]
PAIRS = Annotated[
    Path | None,
    typer.Option(help='JSON Lines: "question", with "concise" and "verbose" thoughts or an exact "answer".'),
]
TASKS = Annotated[str | None, typer.Option(help="Fresh problems of the embedded family: easy, medium or hard.")]
LAYERS = Annotated[str | None, typer.Option(help="Blocks whose output is meant, from 0: 3,4 or all.")]
SEED = Annotated[int, typer.Option(help="Of problems and sampling.")]
MOST = Annotated[int, typer.Option("--max-tokens", min=16, help="Longest completion.")]


@app.command()
def extract(
    name: NAME, recipe: Annotated[Recipe, typer.Option(help="Where the pairs come from.")] = Recipe.asc,
    pairs: PAIRS = None, tasks: TASKS = None, layers: LAYERS = None, model: MODEL = None, vectors_dir: FOLDER = None,
    n: Annotated[int, typer.Option("-n", min=1, help="Questions to make pairs of.")] = 100,
    samples: Annotated[int, typer.Option(min=2, help="Answers per question (efficiency).")] = 8,
    sign_scale: Annotated[float, typer.Option(help="Strength at which the direction is checked.")] = 0.3,
    sign_questions: Annotated[int, typer.Option(min=1, help="Questions of that check.")] = 20,
    keep: Annotated[bool, typer.Option("--keep", help="Store a vector whose direction is wrong, too.")] = False,
    seed: SEED = 0, max_tokens: MOST = 1024,
) -> None:  # fmt: skip
    """Make NAME (state of the last token), NAME-mean (over the thinking), NAME-prompt (of the request to be brief).

    A vector is stored only if adding it shortens and subtracting it lengthens; exit status 1 if none does.
    """
    with _told():
        check_name(f"{name}-prompt")
        found, registry = _open(model, vectors_dir)
        settings = _engine(found, vectors_dir)
        from thinkserve.server import vectors_work as work

        wish = work.Extraction(recipe.value, n, samples, sign_scale, sign_questions, seed, max_tokens)
        source = work.Source(pairs, tasks)
        chosen, tell = _layers(layers, registry, default=True), Console(stderr=True).print
        made = work.extract(settings, found.path, source, chosen, wish, tell)
        stored = [
            registry.put(name if position == "last" else f"{name}-{position}", raw)
            for position, raw, ok in made
            if ok or keep
        ]
    _print(stored)
    raise typer.Exit(0 if stored else 1)


@app.command()
def calibrate(
    name: NAME, pairs: PAIRS = None, tasks: TASKS = None, layers: LAYERS = None, model: MODEL = None,
    vectors_dir: FOLDER = None, n: Annotated[int, typer.Option("-n", min=1, help="Questions per point.")] = 50,
    scales: Annotated[str, typer.Option(help="Strengths to try beside 0.")] = "0.1,0.2,0.3,0.5,0.75,1",
    each: Annotated[bool, typer.Option("--each-layer", help="Try the layers one by one, not together.")] = False,
    tolerance: Annotated[float, typer.Option(min=0, max=1, help="Accuracy that may be lost.")] = 0.01,
    save: Annotated[str | None, typer.Option(help="Name to store the result under; default: the same.")] = None,
    svg: Annotated[Path | None, typer.Option(help="File for the plot.")] = None,
    seed: SEED = 1, max_tokens: MOST = 1024,
) -> None:  # fmt: skip
    """Measure length and accuracy against strength; store what shortens most within the tolerance.

    What is stored has the calibrated layers only; the scale stands in its metadata (`vectors show`).
    """
    with _told():
        check_name(save or name)
        found, registry = _open(model, vectors_dir)
        settings = _engine(found, vectors_dir)
        from thinkserve.server import vectors_work as work

        vector, tried = _find(name, registry), _numbers(scales, float, "scales")
        wish = work.Calibration(tuple(tried), n, tolerance, each, seed, max_tokens)
        chosen = _layers(layers, registry) or list(vector.layers)
        result = work.calibrate(settings, found.path, vector, chosen, work.Source(pairs, tasks), wish, Console().print)
        if svg is not None:
            svg.write_text(result.svg, encoding="utf-8")
        stored = registry.put(save or name, result.raw)
    _print([stored])


@app.command("list")
def list_vectors(model: MODEL = None, vectors_dir: FOLDER = None) -> None:
    """List the vectors of a model; exit status 2, and a line on what is wrong, if files of the folder are none."""
    with _told():
        found = find_model(model)
        good, bad = _read(_folder(found, vectors_dir), shape_of(found))
    _print(good)
    if bad:
        raise StartError(f"Not steering vectors for this model: {'; '.join(bad)}")


@app.command()
def show(name: NAME, model: MODEL = None, vectors_dir: FOLDER = None) -> None:
    """Print everything that is known of a vector, as JSON."""
    with _told():
        _, registry = _open(model, vectors_dir)
        vector = _find(name, registry)
    typer.echo(json.dumps({**vector.described, "name": name, "hidden": vector.hidden}, indent=1))


@app.command()
def rm(name: NAME, model: MODEL = None, vectors_dir: FOLDER = None) -> None:
    """Remove a vector from the folder, be its file usable or not."""
    with _told():
        check_name(name)
        folder = _folder(find_model(model), vectors_dir)
        names = [file.stem for file in vector_files(folder)]
        if name not in names:
            raise BadVector(f"No steering vector {name!r}.{nearest(name, names)}")
        remove_files(folder, name)


@contextmanager
def _told() -> Iterator[None]:
    """Mistakes become the one line that the command line prints."""
    try:
        yield
    except (BadVector, ValueError, ReasoningError) as error:
        raise StartError(str(error)) from None
    except OSError as error:
        raise StartError(f"{error.filename or 'the disk'}: {error.strerror or error}") from None


def _open(model: str | None, folder: Path | None) -> tuple[ModelDir, VectorRegistry]:
    found = find_model(model)
    return found, VectorRegistry(_folder(found, folder), shape_of(found))


def _folder(model: ModelDir, folder: Path | None) -> Path:
    return vectors_folder(Settings.model_construct(vectors_dir=folder), model)


def _read(folder: Path, shape: Shape) -> tuple[list[SteeringVector], list[str]]:
    """The vectors of a folder, and what is wrong with each file that holds none."""
    good, bad = list[SteeringVector](), list[str]()
    for file in vector_files(folder):
        try:
            good.append(read_vector(file, shape))
        except (BadVector, OSError) as error:
            bad.append(f"{clean(file.name)}: {error}")
    return good, bad


def _engine(model: ModelDir, folder: Path | None) -> Settings:
    """The engine that will serve the model, with room for the same model in transformers. Raises StartError."""
    settings = settings_for(model, vectors_dir=folder, steering=True, guidance=False)
    share = min(settings.gpu_memory_utilization, GPU_SHARE)
    return settings.model_copy(update={"gpu_memory_utilization": share})


def _find(name: str, registry: VectorRegistry) -> SteeringVector:
    vectors = registry.snapshot()
    if name not in vectors:
        raise BadVector(f"No steering vector {name!r}.{nearest(name, vectors)}")
    return vectors[name]


def _layers(text: str | None, registry: VectorRegistry, *, default: bool = False) -> list[int]:
    count = registry.shape.layers
    if text == "all":
        return list(range(count))
    if text is None:
        # Three quarters up, where the paper's layers are (21 of 28).
        return [min(count - 1, round(0.75 * count) - 1)] if default else []
    found = sorted(set(_numbers(text, int, "layers")))
    if missing := [layer for layer in found if not 0 <= layer < count]:
        raise BadVector(f"there is no layer {missing[0]}; the model's layers are 0 to {count - 1}")
    return found


def _numbers(text: str, kind: Any, what: str) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise BadVector(f"--{what} takes numbers separated by commas, not {text!r}") from None


def _print(vectors: list[SteeringVector]) -> None:
    table = Table("vector", "version", "layers", "norms", "recipe", "scale", "tokens", box=None, padding=(0, 2, 0, 0))
    for vector in vectors:
        layers = ", ".join(map(str, vector.layers))
        norms = ", ".join(f"{norm:.3g}" for norm in vector.norms.values())
        scale, tokens = (_calibrated(vector.about, key) for key in ("scale", "tokens_ratio"))
        # What others have said of a vector may look like markup, or like anything.
        recipe = Text(clean(vector.recipe, 40))
        table.add_row(vector.name, str(vector.version), layers, norms, recipe, scale, tokens)
    Console().print(table)


def _calibrated(about: Mapping[str, Any], key: str) -> str:
    """A number that the calibration found; empty if the file tells none."""
    match about.get("calibration"):
        case {**found} if isinstance(value := found.get(key), int | float):
            return f"{value:g}"
    return ""
