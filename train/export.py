"""From a training checkpoint to a folder that any Hugging Face loader, and so vLLM, takes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import GenerationConfig, PreTrainedModel, Qwen3ForCausalLM

from thinkserve.train.model import Model, Shape, hf_config
from thinkserve.train.tokenizer import save_tokenizer, special


def to_hf(weights: dict[str, torch.Tensor], shape: Shape, tokenizer: Tokenizer) -> Qwen3ForCausalLM:
    """The model as transformers' Qwen3, in float32. Raises RuntimeError when a parameter is missing or left over."""
    eos, pad = special(tokenizer, "<|im_end|>"), special(tokenizer, "<|endoftext|>")
    model = Qwen3ForCausalLM(hf_config(shape, eos, pad))
    state = {f"model.{name}": weight for name, weight in weights.items()}
    model.load_state_dict({**state, "lm_head.weight": state["model.embed_tokens.weight"]})
    return model


def export(weights: dict[str, torch.Tensor], shape: Shape, tokenizer: Tokenizer, folder: Path) -> None:
    """Write weights (bf16), configuration and tokenizer; the folder appears complete or not at all."""
    model = to_hf(weights, shape, tokenizer)
    eos, pad = model.config.eos_token_id, model.config.pad_token_id
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.7, eos_token_id=eos, pad_token_id=pad)
    publish(model, tokenizer, folder)


def publish(model: PreTrainedModel, tokenizer: Tokenizer, folder: Path, more: Mapping[str, str] = {}) -> None:
    """Write a model in bf16, its tokenizer and `more` files (name -> text); card and evaluation stay."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(part)
    save_tokenizer(tokenizer, part)
    (part / "model.safetensors").chmod(0o644)
    for name, text in more.items():
        (part / name).write_text(text, encoding="utf-8")
    keep(folder, part, ("README.md", "evaluation.json"))
    shutil.rmtree(folder, ignore_errors=True)
    part.replace(folder)


def shape_of(folder: Path) -> Shape:
    """The shape of an exported model, named as its folder."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return Shape(
        folder.name,
        hidden=config["hidden_size"],
        layers=config["num_hidden_layers"],
        feed_forward=config["intermediate_size"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        vocabulary=config["vocab_size"],
    )


def load(folder: Path) -> tuple[Model, Tokenizer]:
    """An exported model, in float32, and its tokenizer."""
    model = Model(shape_of(folder))
    stored = load_file(folder / "model.safetensors")
    model.load_state_dict(
        {name.removeprefix("model."): w.float() for name, w in stored.items() if "lm_head" not in name}
    )
    return model, Tokenizer.from_file(str(folder / "tokenizer.json"))


def keep(old: Path, new: Path, names: tuple[str, ...]) -> None:
    """Carry files over that are not written by the export."""
    for name in names:
        if (old / name).exists():
            shutil.copy2(old / name, new / name)


def log_summary(log: Path) -> dict[str, Any]:
    """The last line of a training log: step, tokens, seconds, loss."""
    lines = log.read_text(encoding="utf-8").splitlines()
    summary: dict[str, Any] = json.loads(lines[-1])
    return summary


def known_training(folder: Path) -> dict[str, Any]:
    """How an exported model was trained, from its evaluation."""
    training: dict[str, Any] = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))["training"]
    return training
