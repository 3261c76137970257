"""The committed reward model keeps what its card promises, and fits the models it judges."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer

from thinkserve.train.model import CONTEXT, IGNORE
from thinkserve.train.prm_chains import Chain, prompt_of
from thinkserve.train.prm_data import encode_steps
from thinkserve.train.prm_eval import Verdict, auroc
from thinkserve.train.step_labels import END
from thinkserve.train.tasks import KINDS, problems

MODELS = Path(__file__).resolve().parents[2] / "models"
FOLDER = MODELS / "arith-prm"
REPORT = json.loads((FOLDER / "evaluation.json").read_text())


def test_right_steps_are_told_from_wrong_ones() -> None:
    """Over the steps of arith-small's own chains, many of them wrong, and of these the first mistakes."""
    assert "arith-small" == REPORT["author"]
    assert REPORT["auroc"]["low"] >= 0.90
    assert REPORT["first_mistakes"]["low"] >= 0.90
    assert REPORT["auroc"]["steps"] > 5000
    assert set(KINDS) == set(REPORT["by_kind"])
    assert all(0.05 < 1 - found["right"] for found in REPORT["by_kind"].values())


def test_the_card_names_the_measured_numbers() -> None:
    """Every figure of the card's tables is one of evaluation.json."""
    card = (FOLDER / "README.md").read_text()
    for found in (REPORT["auroc"], REPORT["first_mistakes"], *REPORT["by_kind"].values(), *REPORT["by_depth"].values()):
        assert f"| {found['value']:.3f} | {found['low']:.3f} .. {found['high']:.3f} | {found['steps']} |" in card
    for rules in REPORT["selection"].values():
        assert all(
            f"{found['value']:.3f} ({found['low']:.3f} .. {found['high']:.3f})" in card for found in rules.values()
        )
    assert f"{REPORT['training']['tokens']:,} tokens in" in card


def test_the_folder_is_what_a_server_expects() -> None:
    """A token classifier with the family's tokenizer and context, in bf16, and the way chains are written for it."""
    config = json.loads((FOLDER / "config.json").read_text())
    stored = load_file(FOLDER / "model.safetensors")
    assert ["Qwen3ForTokenClassification"] == config["architectures"]
    assert {"0": "wrong", "1": "right"} == config["id2label"]
    assert CONTEXT == config["max_position_embeddings"]
    assert {"format": "thinkserve"} == json.loads((FOLDER / "reward.json").read_text())
    assert {torch.bfloat16} == {weight.dtype for weight in stored.values()}
    assert (FOLDER / "model.safetensors").stat().st_size < 13 * 2**20
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (MODELS / "arith-small" / name).read_bytes() == (FOLDER / name).read_bytes()


def written_by_arith_small(count: int, most: int) -> list[Chain]:
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "arith-small", padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(MODELS / "arith-small", dtype=torch.float32)
    tasks = problems("medium", count, 31)
    torch.manual_seed(1)
    prompts = tokenizer([prompt_of(p.question) for p in tasks], return_tensors="pt", padding=True)
    replies = model.generate(**prompts, do_sample=True, temperature=0.7, top_k=0, max_new_tokens=most)
    texts = tokenizer.batch_decode(replies[:, prompts["input_ids"].shape[1] :])
    return [Chain(p, p.question, text.split(END)[0]) for p, text in zip(tasks, texts, strict=True)]


@pytest.mark.slow
def test_fresh_chains_are_judged_as_well_as_the_card_says() -> None:
    """Sampled and scored with transformers, on problems that were in nobody's data."""
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    model = AutoModelForTokenClassification.from_pretrained(FOLDER, dtype=torch.float32).eval()
    steps = []
    for chain in written_by_arith_small(36, 220):
        ids, labels = encode_steps(tokenizer.backend_tokenizer, chain, 512)
        with torch.inference_mode():
            rewards = model(torch.tensor([ids])).logits[0].softmax(-1)[:, 1].tolist()
        ends = [(reward, label) for reward, label in zip(rewards, labels, strict=True) if label != IGNORE]
        steps += [
            Verdict("", chain.problem.kind, "medium", 1, reward, label == 1, early=False) for reward, label in ends
        ]
    assert sum(not step.right for step in steps) > 20
    assert not math.isnan(auroc(steps))
    assert auroc(steps) > 0.85
