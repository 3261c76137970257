"""The slow half of `thinkserve vectors`: imports torch, starts the engine, measures; cli_vectors talks to people.

The engine writes; the same model in transformers gives the states that vectors are made of, and derivatives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from thinkserve.server import vectors_writer
from thinkserve.server.settings import Settings
from thinkserve.server.vectors import SteeringVector
from thinkserve.steering import calibrate as calibration
from thinkserve.steering.calibrate import Bound, Point
from thinkserve.steering.extract import (
    Pair,
    Position,
    differences,
    efficiency_pairs,
    given_pairs,
    own_pairs,
    sign_check,
    to_file,
    to_tensors,
)
from thinkserve.steering.fingerprint import fingerprint
from thinkserve.steering.model import Model
from thinkserve.steering.plot import svg
from thinkserve.steering.questions import Question, from_file, from_tasks, sample
from thinkserve.steering.vector_file import BadVector, VectorFile, serialize
from thinkserve.steering.writer import Vectors, Writer, Written

Tell = Callable[[Any], None]
STATES = 50  # from which the bound is measured
SIGNED = 20  # questions by which the direction is checked again


@dataclass(frozen=True, slots=True)
class Source:
    """Where questions come from: a file or the generators, one of the two."""

    pairs: Path | None
    tasks: str | None

    def questions(self, n: int, seed: int, *, held_out: bool) -> list[Question]:
        """`n` questions. Raises BadVector."""
        if (self.pairs is None) == (self.tasks is None):
            raise BadVector("name either --pairs FILE or --tasks LEVEL")
        if self.pairs is not None:
            return sample(from_file(self.pairs), n, seed)
        return from_tasks(self.tasks or "", n, seed, held_out=held_out)


@dataclass(frozen=True, slots=True)
class Extraction:
    """What `extract` is asked for; see its options."""

    recipe: Literal["asc", "efficiency"]
    n: int
    samples: int
    sign_scale: float
    sign_questions: int
    seed: int
    most: int


def extract(
    settings: Settings, folder: Path, source: Source, layers: Sequence[int], wish: Extraction, tell: Tell
) -> list[tuple[Position, bytes, bool]]:
    """The vectors of a recipe as files, each with whether it points the right way. Raises BadVector, StartError."""
    questions = source.questions(wish.n, wish.seed, held_out=False)
    checks = source.questions(wish.sign_questions, wish.seed + 1, held_out=True)
    made: list[tuple[Position, bytes, bool]] = []
    with vectors_writer.started(settings) as writer:
        # After the engine, which is forked where models are small: torch must not have begun to compute before.
        model = Model(folder)
        pairs = _pairs(model, writer, questions, wish)
        _tell_pairs(pairs, questions, tell)
        prompts = [model.prompt(question.text) for question in checks]
        for position, difference in differences(model, pairs, layers).items():
            sign = sign_check(writer, prompts, difference.vectors, wish.sign_scale, wish.most)
            tell(_sign(position, sign))
            about = {
                "recipe": wish.recipe, "position": position, "pairs": len(pairs),
                "model_fingerprint": fingerprint(folder), "source": source.tasks or "pairs", "seed": wish.seed,
                "sign_check": sign,
            }  # fmt: skip
            made.append((position, serialize(to_file(difference, about)), sign["ok"]))
    return made


def _tell_pairs(pairs: list[Pair], questions: list[Question], tell: Tell) -> None:
    mean = [
        sum(map(len, each)) / max(1, len(pairs)) for each in ([p.concise for p in pairs], [p.verbose for p in pairs])
    ]
    tell(f"{len(pairs)} pairs of {len(questions)} questions; mean thinking {mean[0]:.0f} against {mean[1]:.0f} tokens")


def _sign(which: str, sign: Mapping[str, Any]) -> str:
    scale, lengths = sign["scale"], list(sign["tokens"].values())
    return f"{which}: tokens at +{scale:g}, 0, -{scale:g}: {lengths} {'ok' if sign['ok'] else 'WRONG'}"


def _pairs(model: Model, writer: Writer, questions: list[Question], wish: Extraction) -> list[Pair]:
    if wish.recipe == "asc" and any(question.concise for question in questions):
        return given_pairs(model, questions)
    if any(question.answer is None for question in questions):
        raise BadVector("questions without thoughts need an exact answer, so that wrong thoughts are left out")
    if wish.recipe == "asc":
        return own_pairs(model, writer, questions, wish.seed, wish.most)
    return efficiency_pairs(model, writer, questions, wish.samples, wish.seed, wish.most)


@dataclass(frozen=True, slots=True)
class Calibration:
    """What `calibrate` is asked for; see its options."""

    scales: tuple[float, ...]
    n: int
    tolerance: float
    each_layer: bool
    seed: int
    most: int


@dataclass(frozen=True, slots=True)
class Calibrated:
    """The vector with its calibration, as a file, and the plot."""

    raw: bytes
    svg: str


@dataclass(frozen=True, slots=True)
class Sweep:
    """One choice of layers: its points (scale 0 among them), the one to use, and the bound."""

    layers: tuple[int, ...]
    points: list[Point]
    chosen: Point
    bound: Bound


def calibrate(
    settings: Settings,
    folder: Path,
    vector: SteeringVector,
    layers: Sequence[int],
    source: Source,
    wish: Calibration,
    tell: Tell,
) -> Calibrated:
    """Sweep the strengths, for the layers together or one by one, and keep the shortest without loss.

    Raises BadVector, StartError.
    """
    missing = [layer for layer in layers if layer not in vector.layers]
    if missing or not all(0 < scale <= 10 for scale in wish.scales):
        raise BadVector(f"the vector has no layer {missing[0]}" if missing else "scales lie above 0 and up to 10")
    questions = source.questions(wish.n, wish.seed, held_out=True)
    if any(question.answer is None for question in questions):
        raise BadVector("calibration needs questions with an exact answer")
    groups = [(layer,) for layer in layers] if wish.each_layer else [tuple(layers)]
    with vectors_writer.started(settings) as writer:
        measured = _Measured(Model(folder), writer, questions, wish)
        sweeps = [measured.sweep(vector, group) for group in groups]
        best = min(sweeps, key=lambda sweep: sweep.chosen.tokens)
        sign = measured.sign(vector, best)
    plain, asked = measured.plain, measured.asked
    tell(_table(sweeps, plain, asked))
    for sweep in sweeps:
        tell(_sentence(sweep, plain))
    about = {**vector.about, "calibration": _summary(best, plain, asked, wish)}
    if sign:
        tell(_sign("calibrated", sign))
        about["sign_check"] = sign
    file = VectorFile({n: vector.layers[n] for n in best.layers}, about)
    title = f"{vector.name}, layer {', '.join(map(str, best.layers))} ({wish.n} questions)"
    return Calibrated(serialize(file), svg(title, best.points, best.chosen, asked))


class _Measured:
    """What no vector and what asking for brevity do to the questions; and, on demand, what a vector does."""

    def __init__(self, model: Model, writer: Writer, questions: list[Question], wish: Calibration) -> None:
        self._model, self._writer, self._questions, self._wish = model, writer, questions, wish
        self.plain, written = self._point({}, 0)
        self.asked, _ = self._point({}, 0, brief=True)
        self._states = calibration.cut_anywhere(model, questions, written, STATES, wish.seed)

    def sweep(self, vector: SteeringVector, layers: tuple[int, ...]) -> Sweep:
        """All scales for these layers together."""
        part = _part(vector, layers)
        points = [self.plain, *(self._point(part, scale)[0] for scale in self._wish.scales)]
        chosen = calibration.choose(points, self._wish.tolerance)
        return Sweep(layers, points, chosen, calibration.bound(self._model, part, self._states))

    def sign(self, vector: SteeringVector, best: Sweep) -> dict[str, Any]:
        """The direction again, of the layers and at the scale that were chosen; nothing when none was."""
        if not best.chosen.scale:
            return {}
        prompts = [self._model.prompt(question.text) for question in self._questions[:SIGNED]]
        return sign_check(self._writer, prompts, _part(vector, best.layers), best.chosen.scale, self._wish.most)

    def _point(self, vectors: Vectors, scale: float, *, brief: bool = False) -> tuple[Point, list[Written]]:
        seed, most = self._wish.seed, self._wish.most
        return calibration.measure(
            self._model, self._writer, self._questions, vectors, scale, seed=seed, most=most, brief=brief
        )


def _part(vector: SteeringVector, layers: Sequence[int]) -> Vectors:
    return to_tensors({layer: vector.layers[layer] for layer in layers})


def _table(sweeps: Sequence[Sweep], plain: Point, asked: Point) -> Table:
    names = ("layers", "scale", "tokens", "ratio", "thinking", "accuracy", "closed")
    table = Table(*names, box=None, padding=(0, 2, 0, 0))
    _row(table, "none", plain, plain)
    _row(table, "asked to be brief", asked, plain)
    for sweep in sweeps:
        for point in sweep.points[1:]:
            _row(table, ", ".join(map(str, sweep.layers)), point, plain)
    return table


def _row(table: Table, layers: str, point: Point, plain: Point) -> None:
    numbers = (
        f"{point.scale:g}", f"{point.tokens:.1f}", f"{point.tokens / plain.tokens:.2f}", f"{point.thinking:.1f}",
        f"{100 * point.accuracy:.1f}%", f"{100 * point.closed:.0f}%",
    )  # fmt: skip
    table.add_row(layers, *numbers)


def _sentence(sweep: Sweep, plain: Point) -> str:
    layers, bound, chosen = ", ".join(map(str, sweep.layers)), sweep.bound, sweep.chosen
    measured = f"a = {bound.slope:.4g}, L = {bound.curvature:.4g} over {bound.states} states"
    ratio = f"{chosen.tokens / plain.tokens:.2f}x tokens"
    return f"layer {layers}: gamma* = {bound.gamma:.4g} ({measured}); chosen scale {chosen.scale:g}, {ratio}"


def _summary(best: Sweep, plain: Point, asked: Point, wish: Calibration) -> Mapping[str, Any]:
    def numbers(point: Point) -> dict[str, float]:
        return {name: round(value, 4) for name, value in asdict(point).items()}

    bound = best.bound
    return {
        "scale": best.chosen.scale,
        "tokens_ratio": round(best.chosen.tokens / plain.tokens, 4),
        "questions": wish.n,
        "tolerance": wish.tolerance,
        "gamma_star": bound.gamma,
        "slope": bound.slope,
        "curvature": bound.curvature,
        "epsilon": bound.epsilon,
        "points": [numbers(point) for point in best.points],
        "asked_to_be_brief": numbers(asked),
    }
