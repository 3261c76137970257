"""Budget guidance on the front end's side: which predictor is served, and what a guided job tells the worker."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from thinkserve.server.model_dir import ModelDir, StartError
from thinkserve.server.settings import Settings
from thinkserve.strategies.controls import Guide
from thinkserve.strategies.engine import Job, ModelInfo, Tokens
from thinkserve.strategies.errors import BadOptions, Unsupported
from thinkserve.strategies.text import last_tags

FOLDER = "budget"
UNAVAILABLE = "This model has no budget predictor, so it takes no budget guidance; `thinkserve budget train` makes one."


def find_predictor(settings: Settings, model: ModelDir) -> Path | None:
    """The folder of the predictor that fits the model: the one configured, else `budget/` of the model, else None.

    Raises StartError when it does not fit: in sizes, or, unless it was configured, because the weights are others.
    """
    folder = settings.budget_predictor or model.path / FOLDER
    if settings.budget_predictor is None and not folder.is_dir():
        return None
    from thinkserve.guidance.checkpoint import ABOUT, BadPredictor, read_about
    from thinkserve.steering.fingerprint import fingerprint

    # A training that is under way has written its traces there, but no predictor yet.
    if settings.budget_predictor is None and not (folder / ABOUT).exists():
        return None
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
    opens = _opens(job.prompt, info)
    return {} if opens is None else {"guide": {"budget": budget, "start": len(job.prompt), "open": opens}}


def _opens(prompt: Tokens, info: ModelInfo) -> int | None:
    """-1: the prompt has opened thinking; a token: the one that will; None: thinking is over or never begins."""
    opened, closed = last_tags(info, prompt)
    if opened > closed:
        return -1
    return info.think_open[0] if closed < 0 and len(info.think_open) == 1 else None
