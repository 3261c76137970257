"""The model card: written from the training log and the evaluation, so that no number in it is anybody's memory."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch

from thinkserve.strategies.verifier import ASK_EXISTS, ASK_SAME
from thinkserve.train.model import Shape
from thinkserve.train.side_tasks import ASK_CONTINUE, ASK_JUDGE, ASK_SUMMARY, BRIEF

TEXT = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---
# {name}

A reasoning model in miniature, trained from scratch on generated problems so that every claim of thinkserve can be
re-run by anybody on two CPU cores. It thinks in English steps, doubts itself, goes over its results again, and makes
mistakes of its own. It knows three kinds of problem and nothing else; it is not a product model.

- Architecture: Qwen3, {layers} layers, hidden size {hidden}, {parameters:,} parameters, vocabulary {vocabulary},
  context 4096
- Problems: chained operations, bracketed expressions, objects that change hands (`train/tasks.py`); answers in
  `\\boxed{{}}`
- Data: generated while training, {tokens:,} tokens; no problem seen that the evaluation can ask (split by a hash)
- Training: {training}
- Slips in the training traces carry no loss; only the reaction to them is learned

## Evaluation
`python -m thinkserve.train --evaluate` measures this again and rewrites this card.
{n} fresh problems of medium difficulty, T=0.7 unless greedy. pass@1 is of 8 chains for each problem, its interval by
resampling problems; where a problem has one answer to count, the interval is Wilson's.

| measure | value | 95% interval |
|---|---|---|
{rows}

Mean length in tokens: {mean_tokens} (right {mean_tokens_right}, wrong {mean_tokens_wrong}).

## Wordings it was trained on
- Concise thinking: {brief}
- Direct answer: `enable_thinking=false` in the chat template
- Verification, answered Yes or No: `{exists}` and `{same}`
- Progress: `{summary}`, and to go on from a summary: `{go_on}`
- Judgement: `{judge}`
{vectors}{predictor}"""
VECTORS = """
## Steering vectors
How they were made and what they do: `steering/README.md` and `thinkserve vectors show NAME --model models/{name}`.

"""
PREDICTOR = """
## Budget predictor
`budget/`: how many tokens of thinking are left, learned from {traces} traces of the model's own; how well, tells
`thinkserve budget show --model models/{name}`.
"""


def hardware() -> str:
    """What this runs on, in words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = next(
        (line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.machine()
    )
    return f"{torch.get_num_threads()} core(s) of {model}"


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def stages(log: dict[str, Any]) -> list[dict[str, Any]]:
    """The trainings that led to a model, first to last."""
    before = log.get("before")
    return [*(stages(before) if before else []), log]


def told(stage: dict[str, Any]) -> str:
    """One training in words."""
    minutes, rate, half = stage["seconds"] / 60, stage["tokens_per_s"], stage.get("half")
    begun = f"began as {half} at twice the width; " if half else ""
    return (
        f"{begun}{stage['tokens']:,} tokens in {minutes:.0f} minutes on {stage['hardware']} ({rate:,} tokens/s),"
        f" last loss {stage['loss']:.3f} nats per learned token"
    )


def write_card(folder: Path, shape: Shape, log: dict[str, Any], report: dict[str, Any]) -> None:
    """Write README.md and evaluation.json into the model's folder."""
    medium = report["medium"]
    measures = {
        "pass@1, greedy": medium["greedy_pass@1"],
        "pass@1": medium["pass@1"],
        "majority@8": medium["majority@8"],
        "shortest of 8": medium["short-1@8"],
        "vote of the shortest 3 of 8": medium["short-3@8"],
        "pass@1, easy": report["easy"]["pass@1"],
        "pass@1, hard": report["hard"]["pass@1"],
        "pass@1, asked to be brief": report["brief_medium"]["pass@1"],
        **{f"pass@1, {kind}": value for kind, value in medium["by_kind"].items()},
        **{f"side task {name}": value for name, value in report["side_tasks"].items()},
    }
    text = TEXT.format(
        name=shape.name,
        layers=shape.layers,
        hidden=shape.hidden,
        vocabulary=shape.vocabulary,
        parameters=report["parameters"],
        tokens=sum(stage["tokens"] for stage in stages(log)),
        training="\n  Then, on a later mixture: ".join(map(told, stages(log))),
        n=medium["problems"],
        rows="\n".join(f"| {k} | {v['value']:.3f} | {v['low']:.3f} .. {v['high']:.3f} |" for k, v in measures.items()),
        mean_tokens=medium["mean_tokens"],
        mean_tokens_right=medium["mean_tokens_right"],
        mean_tokens_wrong=medium["mean_tokens_wrong"],
        brief=", ".join(f'"{words}"' for words in BRIEF),
        exists=_one_line(ASK_EXISTS),
        same=_one_line(ASK_SAME),
        summary=_one_line(ASK_SUMMARY),
        go_on=_one_line(ASK_CONTINUE),
        judge=_one_line(ASK_JUDGE),
        vectors=_vectors(folder),
        predictor=_predictor(folder),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
    (folder / "evaluation.json").write_text(json.dumps({"training": log, **report}, indent=1) + "\n", encoding="utf-8")


def _vectors(folder: Path) -> str:
    """The section on the vectors that lie beside the weights; empty if there are none."""
    lines = [_vector(file.stem, json.loads(file.read_text("utf-8"))) for file in sorted(folder.glob("vectors/*.json"))]
    return VECTORS.format(name=folder.name) + "".join(lines) if lines else ""


def _vector(name: str, facts: dict[str, Any]) -> str:
    layers, scale = ", ".join(facts["norms"]), (facts.get("calibration") or {}).get("scale")
    strength = "not calibrated" if scale is None else f"meant for scale {scale:g}"
    where = f"recipe {facts['recipe']}, position {facts['position']}, layers {layers} ({facts['convention']})"
    return f"- `{name}`: {where}, {strength}\n"


def _predictor(folder: Path) -> str:
    """The section on the predictor that lies beside the weights; empty if there is none."""
    file = folder / "budget" / "predictor.json"
    if not file.exists():
        return ""
    return PREDICTOR.format(name=folder.name, traces=json.loads(file.read_text("utf-8"))["training"]["traces_used"])


def _one_line(text: str) -> str:
    return text.replace("\n", " / ")
