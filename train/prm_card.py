"""The reward model's card: written from the training log and the evaluation, as the other cards are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from thinkserve.train.card import told
from thinkserve.train.model import Shape

TEXT = """---
license: apache-2.0
library_name: transformers
pipeline_tag: token-classification
---
# {name}

The process reward model of the arith family: how likely the step that ends here is right. Trained on exact labels, from
the weights of arith-large, so that search with a reward model can be tried by anybody on two CPU cores. It knows the
family's three kinds of problem, written as the family writes them, and nothing else.

- Architecture: `Qwen3ForTokenClassification`, {layers} layers, hidden size {hidden}, {parameters:,} parameters, labels
  0 "wrong" and 1 "right", context 4096
- Reads: the chat prompt with its thinking opened, `{prompt}`, then
  the steps as they were written, each with its blank line, the last with the answer, tags left out; each step is
  tokenized on its own, and nothing is inserted
- Reward of a step: softmax of the two logits at the step's last token, class 1
- A step is right if every equation in it, what it takes from earlier results, the state it writes out and the answer it
  concludes with are right; what builds on a wrong value is wrong until it is corrected (`train/step_labels.py`)
- Data: {data}
- Training: two fresh layers on arith-large as it is, which learn to notice what it did not expect, and from labelled
  steps what that means; {training}

## Evaluation
`python -m thinkserve.train --only prm --evaluate` measures this again and rewrites this card.
{chains} chains that {author} wrote at T=0.7 for
{problems} fresh problems of the evaluation split, 8 for each. Intervals are 95%, by resampling problems; Wilson's where
a problem has one answer to count.

| steps | AUROC | 95% interval | steps | share right |
|---|---|---|---|---|
{rows}

"Up to the first mistake" leaves out what only follows from it.

| depth of the step | mean reward | share right | calibration error |
|---|---|---|---|
{depths}

| of the same 8 chains | {levels} |
|---|{dashes}|
{selection}
"""


def write_card(folder: Path, shape: Shape, log: dict[str, Any], report: dict[str, Any]) -> None:
    """Write README.md and evaluation.json into the model's folder."""
    groups = {
        "all": report["auroc"],
        "up to the first mistake": report["first_mistakes"],
        **report["by_kind"],
        **report["by_level"],
        **{f"depth {name}": found for name, found in report["by_depth"].items()},
    }
    levels = list(report["selection"])
    text = TEXT.format(
        name=shape.name,
        layers=shape.layers,
        hidden=shape.hidden,
        prompt="<|im_start|>user\\n{question}<|im_end|>\\n<|im_start|>assistant\\n<think>\\n",
        parameters=report["parameters"],
        data=log["data"],
        training=told(log),
        chains=report["chains"],
        author=report["author"],
        problems=report["problems"],
        rows="\n".join(_auroc_row(name, found) for name, found in groups.items()),
        depths="\n".join(
            f"| {name} | {found['reward']:.3f} | {found['right']:.3f} | {found['calibration_error']:.3f} |"
            for name, found in report["by_depth"].items()
        ),
        levels=" | ".join(levels),
        dashes="|".join("---" for _ in levels),
        selection="\n".join(
            f"| {rule} | " + " | ".join(_accuracy(report["selection"][level][rule]) for level in levels) + " |"
            for rule in report["selection"][levels[0]]
        ),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
    (folder / "evaluation.json").write_text(json.dumps({"training": log, **report}, indent=1) + "\n", encoding="utf-8")


def _auroc_row(name: str, found: Mapping[str, float]) -> str:
    bounds = f"{found['low']:.3f} .. {found['high']:.3f}"
    return f"| {name} | {found['value']:.3f} | {bounds} | {found['steps']} | {found['right']:.3f} |"


def _accuracy(found: Mapping[str, float]) -> str:
    return f"{found['value']:.3f} ({found['low']:.3f} .. {found['high']:.3f})"
