"""Budget guidance on the front end's side: which predictor is served, and what a guided job tells the worker."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from thinkserve.guidance import ABOUT
from thinkserve.server.model_dir import ModelDir, StartError
from thinkserve.server.settings import Settings
from thinkserve.strategies.controls import Guide
from thinkserve.strategies.engine import Job, ModelInfo, Tokens
from thinkserve.strategies.errors import BadOptions, Unsupported
from thinkserve.strategies.text import last_tags

FOLDER = "budget"
UNAVAILABLE = "This model has no budget predictor, so it takes no budget guidance; `thinkserve budget train` makes one."


def predictor_folder(settings: Settings, model: ModelDir) -> Path | None:
    """Where the model's predictor is: the folder configured, else `budget/` of the model, else None. Cheap."""
    if not settings.guidance:
        return None
    if settings.budget_predictor is not None:
        return settings.budget_predictor
    # A training that is under way has written its traces there, but no predictor yet.
    folder = model.path / FOLDER
    return folder if (folder / ABOUT).exists() else None


def find_predictor(settings: Settings, model: ModelDir) -> Path | None:
    """The folder of the predictor, known to fit the model, or None where there is none.

    Raises StartError when it does not fit: in sizes, or, unless it was configured, because the weights are others.
    """
    folder = predictor_folder(settings, model)
    if folder is None:
        return None
    from thinkserve.guidance.checkpoint import BadPredictor, read_about
    from thinkserve.steering.fingerprint import fingerprint

    try:
        about = read_about(folder)
    except BadPredictor as error:
        raise StartError(str(error)) from error
    config = json.loads((model.path / "config.json").read_text(encoding="utf-8"))
    config = config.get("text_config", config)
    sizes = (config.get("hidden_size"), config.get("num_hidden_layers", -1) + 1, config.get("vocab_size"))
    fits = sizes == (about.size.hidden, about.size.states, about.size.vocabulary)
    if not fits or (settings.budget_predictor is None and about.model != fingerprint(model.path)):
        raise StartError(f"the budget predictor in {folder} is of another model: run `thinkserve budget train` again")
    return folder.resolve()


def guidance(job: Job, info: ModelInfo, served: bool) -> dict[str, Any]:
    """The worker's part of SamplingParams.extra_args. Raises Unsupported without a predictor, BadOptions."""
    asked = [control for control in job.controls if isinstance(control, Guide)]
    if not asked:
        return {}
    if not served or len(info.think_close) != 1:
        raise Unsupported(UNAVAILABLE, "strategy")
    # Several budgets of one job: the tightest holds.
    budget = min(control.budget for control in asked)
    if budget < 1:
        raise BadOptions("The budget must be at least one token.", "budget")
    opens, begun = _opens(job.prompt[job.since :], info)
    if opens is None:
        return {}
    return {"guide": {"budget": budget, "start": len(job.prompt), "open": opens, "begun": begun}}


def _opens(prompt: Tokens, info: ModelInfo) -> tuple[int | None, bool]:
    """-1: the prompt has opened thinking; a token: the one that will; None: thinking is over or never begins.

    And whether some of the thinking stands in the prompt: what another job has written, or a template's line break.
    """
    opened, closed = last_tags(info, prompt)
    if opened > closed:
        return -1, len(prompt) > opened + len(info.think_open)
    return (info.think_open[0] if closed < 0 and len(info.think_open) == 1 else None), False
