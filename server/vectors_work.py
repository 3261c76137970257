"""The slow half of `thinkserve vectors`: imports torch, loads the model, measures; cli_vectors talks to people."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

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

Tell = Callable[[Any], None]
STATES = 50  # from which the bound is measured


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
    folder: Path, source: Source, layers: Sequence[int], wish: Extraction, tell: Tell
) -> Iterator[tuple[Position, bytes, bool]]:
    """The vectors of a recipe as files, each with whether it points the right way. Raises BadVector."""
    questions = source.questions(wish.n, wish.seed, held_out=False)
    model = Model(folder)
    chosen = model.checked(layers)
    pairs = _pairs(model, questions, wish)
    mean = [
        sum(map(len, each)) / max(1, len(pairs)) for each in ([p.concise for p in pairs], [p.verbose for p in pairs])
    ]
    tell(f"{len(pairs)} pairs of {len(questions)} questions; mean thinking {mean[0]:.0f} against {mean[1]:.0f} tokens")
    checks = source.questions(wish.sign_questions, wish.seed + 1, held_out=True)
    for position, difference in differences(model, pairs, chosen).items():
        sign = sign_check(model, difference.vectors, wish.sign_scale, checks, wish.most)
        lengths, verdict = sign["tokens"], "ok" if sign["ok"] else "WRONG"
        tell(f"{position}: tokens at +{wish.sign_scale:g}, 0, -{wish.sign_scale:g}: {list(lengths.values())} {verdict}")
        about = {
            "recipe": wish.recipe, "position": position, "pairs": len(pairs), "model_fingerprint": fingerprint(folder),
            "source": source.tasks or "pairs", "seed": wish.seed, "sign_check": sign,
        }  # fmt: skip
        yield position, serialize(to_file(difference, about)), sign["ok"]


def _pairs(model: Model, questions: list[Question], wish: Extraction) -> list[Pair]:
    if wish.recipe == "asc" and any(question.concise for question in questions):
        return given_pairs(model, questions)
    if any(question.answer is None for question in questions):
        raise BadVector("questions without thoughts need an exact answer, so that wrong thoughts are left out")
    if wish.recipe == "asc":
        return own_pairs(model, questions, wish.seed, wish.most)
    return efficiency_pairs(model, questions, wish.samples, wish.seed, wish.most)


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
    folder: Path, vector: SteeringVector, layers: Sequence[int], source: Source, wish: Calibration, tell: Tell
) -> Calibrated:
    """Sweep the strengths, for the layers together or one by one, and keep the shortest without loss."""
    missing = [layer for layer in layers if layer not in vector.layers]
    if missing or not all(0 < scale <= 10 for scale in wish.scales):
        raise BadVector(f"the vector has no layer {missing[0]}" if missing else "scales lie above 0 and up to 10")
    questions = source.questions(wish.n, wish.seed, held_out=True)
    if any(question.answer is None for question in questions):
        raise BadVector("calibration needs questions with an exact answer")
    model = Model(folder)
    plain, written = calibration.measure(model, questions, {}, 0, seed=wish.seed, most=wish.most)
    asked, _ = calibration.measure(model, questions, {}, 0, seed=wish.seed, most=wish.most, brief=True)
    states = calibration.cut_anywhere(model, questions, written, STATES, wish.seed)
    table = Table(
        "layers", "scale", "tokens", "ratio", "thinking", "accuracy", "closed", box=None, padding=(0, 2, 0, 0)
    )
    _row(table, "none", plain, plain)
    _row(table, "asked to be brief", asked, plain)
    sweeps: list[Sweep] = []
    for group in [(layer,) for layer in layers] if wish.each_layer else [tuple(layers)]:
        part = to_tensors({layer: vector.layers[layer] for layer in group})
        points = [plain]
        for scale in wish.scales:
            point, _ = calibration.measure(model, questions, part, scale, seed=wish.seed, most=wish.most)
            points.append(point)
            _row(table, ", ".join(map(str, group)), point, plain)
        chosen = calibration.choose(points, wish.tolerance)
        sweeps.append(Sweep(group, points, chosen, calibration.bound(model, part, states)))
    best = min(sweeps, key=lambda sweep: sweep.chosen.tokens)
    tell(table)
    for sweep in sweeps:
        tell(_sentence(sweep, plain))
    found = _summary(best, plain, asked, wish)
    file = VectorFile({n: vector.layers[n] for n in best.layers}, {**vector.about, "calibration": found})
    title = f"{vector.name}, layer {', '.join(map(str, best.layers))} ({wish.n} questions)"
    return Calibrated(serialize(file), svg(title, best.points, best.chosen, asked))


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
