"""Tiny models on one thread, and one tiny model folder that transformers can load."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config, Qwen3Model

from tests.one_thread import one_thread
from thinkserve.server.model_dir import MODELS

__all__ = ["one_thread"]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights with the embedded family's tokenizer."""
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=640, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=512,
    )  # fmt: skip
    Qwen3Model(config).save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (path / name).write_bytes((MODELS / "arith-small" / name).read_bytes())
    found = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(found | {"architectures": ["Qwen3ForCausalLM"]}))
    return path
