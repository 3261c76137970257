"""A model small enough to run anything on: two blocks, random weights, the tokenizer of the embedded family."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tests.one_thread import one_thread
from thinkserve.steering.model import Model

__all__ = ["one_thread"]

EMBEDDED = Path(__file__).resolve().parents[2] / "models" / "arith-small"
HIDDEN = 16


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=640, hidden_size=HIDDEN, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=512, eos_token_id=2, initializer_range=0.5,
        tie_word_embeddings=True,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(EMBEDDED / name, folder)
    return folder


@pytest.fixture(scope="session")
def model(folder: Path) -> Model:
    return Model(folder, device="cpu")
