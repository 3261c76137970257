"""Tiny random reward models of every family, as Hugging Face folders, with what transformers computes of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModel

EMBEDDED = Path(__file__).resolve().parents[2] / "models" / "arith-small"
MARKER = "<extra_0>"
HIDDEN = 64


@dataclass(frozen=True, slots=True)
class Tiny:
    """A model's folder, and its logits [labels] at positions of a sequence."""

    folder: Path
    logits: Callable[[Sequence[int], Sequence[int]], list[list[float]]]


def value_head() -> nn.Module:
    """Skywork's: one linear value per token."""
    return nn.Linear(HIDDEN, 1)


def two_layers() -> nn.Module:
    """Qwen2.5-Math-PRM's."""
    return nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 2))


def classifier() -> nn.Module:
    """A token classifier of two labels."""
    return nn.Linear(HIDDEN, 2)


# By architecture: the family of the model below the head, the head and the name of its weights.
HEADS = {
    "Qwen3ForTokenClassification": ("qwen3", classifier, "score."),
    "Qwen2ForProcessRewardModel": ("qwen2", two_layers, "score."),
    "Qwen2ForPrmModel": ("qwen2", value_head, "v_head.summary."),
}


def make(folder: Path, architecture: str) -> Tiny:
    """Write a model of two layers with the embedded family's tokenizer and Qwen's marker of steps."""
    kind, head_of, prefix = HEADS[architecture]
    shape = {
        "vocab_size": 648, "hidden_size": HIDDEN, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
    }  # fmt: skip
    torch.manual_seed(1)
    config = AutoConfig.for_model(kind, **shape, architectures=[architecture], dtype="float32")
    body, head = AutoModel.from_config(config).eval(), head_of().eval()
    config.save_pretrained(folder)
    for weights in head.parameters():
        # Logits around 1: rewards that are neither 0 nor 1.
        nn.init.normal_(weights, std=HIDDEN**-0.5)
    named = {**{f"model.{name}": each for name, each in body.state_dict().items()}}
    named |= {f"{prefix}{name}": each for name, each in head.state_dict().items()}
    save_file({name: each.contiguous() for name, each in named.items()}, folder / "model.safetensors", {"format": "pt"})
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(EMBEDDED / name, folder)
    tokenizer: dict[str, Any] = json.loads((EMBEDDED / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 640, "content": MARKER})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))

    def logits(tokens: Sequence[int], ends: Sequence[int]) -> list[list[float]]:
        with torch.no_grad():
            found: list[list[float]] = head(body(torch.tensor([list(tokens)])).last_hidden_state[0])[
                list(ends)
            ].tolist()
        return found

    return Tiny(folder, logits)
