"""A Hugging Face model under our hands, in float32: states of its blocks, and hooks that change them.

Vectors are made of these states; what a vector does to whole thoughts is measured on the engine (writer.py).
Layer n is the block counted from 0, its state the block's OUTPUT.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from thinkserve.steering.vector_file import BadVector


class Model:
    """A causal language model from a directory, with its chat template."""

    def __init__(self, folder: Path, device: str | None = None) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        # Plain attention, because derivatives in forward mode (calibrate.py) do not go through the fused kernels.
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        self.model: Any = loaded.to(self.device).eval().requires_grad_(False)
        self.blocks = _blocks(self.model)
        self.hidden = int(self.model.config.get_text_config().hidden_size)

    def prompt(self, question: str) -> list[int]:
        """Tokens of a one-turn chat up to where the model takes over."""
        chat = [{"role": "user", "content": question}]
        text = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        return self.encode(text)

    def encode(self, text: str) -> list[int]:
        """Tokens of plain text."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of the tokens, special ones left out."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))

    @torch.inference_mode()
    def states(self, prompt: list[int], thought: list[int], layers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """States of prompt + thought: of the last token, and the mean over the thought; each [layers, hidden]."""
        kept: dict[int, Tensor] = {}

        def keep(layer: int, hidden: Tensor) -> Tensor:
            kept[layer] = hidden[0, len(prompt) :]
            return hidden

        with ExitStack() as stack:
            for layer in layers:
                stack.enter_context(self.hooked(layer, keep))
            self.model(torch.tensor([prompt + thought], device=self.device), use_cache=False, logits_to_keep=1)
        found = [kept[layer] for layer in layers]
        return torch.stack([h[-1] for h in found]), torch.stack([h.mean(0) for h in found])

    @contextmanager
    def hooked(self, layer: int, change: Any) -> Iterator[None]:
        """Within the block, `change(layer, hidden [batch, time, hidden])` takes the place of the layer's output."""

        def hook(_: nn.Module, __: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (change(layer, output[0]), *output[1:])
            return change(layer, output)

        handle = self.blocks[layer].register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()


def _blocks(model: nn.Module) -> Sequence[nn.Module]:
    """The transformer blocks: the one list of modules that is as long as the configuration says."""
    count = model.config.get_text_config().num_hidden_layers  # type: ignore[union-attr, operator]
    found = [each for each in model.modules() if isinstance(each, nn.ModuleList) and len(each) == count]
    if not found:
        raise BadVector("the model's blocks cannot be found")
    return list(found[0])
