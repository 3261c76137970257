"""A predictor on disk: `predictor.safetensors` and beside it `predictor.json`, by default in `budget/` of the model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from thinkserve.guidance import ABOUT
from thinkserve.guidance.predictor import Predictor, Size

LAM_MIN = 10.0  # the published mask
WEIGHTS = "predictor.safetensors"


class BadPredictor(ValueError):
    """No usable predictor, or one of another model; the message is one line for the operator."""


@dataclass(frozen=True, slots=True)
class About:
    """What is known of a predictor besides its weights.

    `close` is the token that ends thinking, `newlines` are the tokens whose text holds a line break, `model` is the
    fingerprint of the weights whose traces it learned from. `lam_min` is the rate below which a prediction is too
    diffuse to count: the paper's, or less for a model whose thinking is harder to predict. `training` says how and how
    well, as JSON.
    """

    size: Size
    close: int
    newlines: tuple[int, ...]
    model: str
    lam_min: float = LAM_MIN
    training: Mapping[str, Any] = field(default_factory=dict[str, Any])


def save(folder: Path, predictor: Predictor, about: About) -> None:
    """Write both files; each is complete or not there."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in predictor.state_dict().items()}
    save_file(tensors, folder / f"{WEIGHTS}.part")
    (folder / f"{ABOUT}.part").write_text(json.dumps(asdict(about), indent=1) + "\n", encoding="utf-8")
    (folder / f"{WEIGHTS}.part").chmod(0o644)
    for name in (WEIGHTS, ABOUT):
        (folder / f"{name}.part").replace(folder / name)


def read_about(folder: Path) -> About:
    """The facts alone. Raises BadPredictor."""
    try:
        found = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        return About(
            Size(**found["size"]),
            found["close"],
            tuple(found["newlines"]),
            found["model"],
            float(found["lam_min"]),
            found.get("training", {}),
        )
    except FileNotFoundError:
        raise BadPredictor(f"no budget predictor in {folder}; `thinkserve budget train` makes one") from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise BadPredictor(f"not a budget predictor: {folder / ABOUT} ({error})") from error


def load(folder: Path) -> tuple[Predictor, About]:
    """A predictor ready to use, on the CPU. Raises BadPredictor."""
    about = read_about(folder)
    predictor = Predictor(about.size)
    try:
        predictor.load_state_dict(load_file(folder / WEIGHTS))
    except Exception as error:
        raise BadPredictor(f"damaged budget predictor: {folder / WEIGHTS}") from error
    return predictor.eval().requires_grad_(False), about
