"""A Hugging Face model under our hands: states of its blocks, and generation with a vector added to them.

Offline counterpart of steering in the engine, by forward hooks, in float32: vectors are made and measured here, and the
engine is tested against it. Layer n is the block counted from 0, its state the block's OUTPUT.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from thinkserve.steering.vector_file import BadVector

Vectors = Mapping[int, Tensor]


@dataclass(frozen=True, slots=True)
class Written:
    """One completion: all its tokens, and those of its thinking (before the closing tag; all when it never closes)."""

    tokens: list[int]
    thinking: list[int]
    closed: bool


class Model:
    """A causal language model from a directory, with its chat template; `close` is the tag that ends thinking."""

    def __init__(self, folder: Path, close: str = "</think>", device: str | None = None) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        # Plain attention, because derivatives in forward mode (calibrate.py) do not go through the fused kernels.
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        self.model: Any = loaded.to(self.device).eval().requires_grad_(False)
        self.blocks = _blocks(self.model)
        self.hidden = int(self.model.config.get_text_config().hidden_size)
        tag = self.tokenizer.encode(close, add_special_tokens=False)
        self.close: int | None = tag[0] if len(tag) == 1 else None
        ends = self.model.generation_config.eos_token_id
        self.ends = frozenset([ends] if isinstance(ends, int) else ends or ())

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

    def checked(self, layers: Sequence[int]) -> list[int]:
        """The layers, sorted. Raises BadVector for one that the model does not have."""
        for layer in layers:
            if not 0 <= layer < len(self.blocks):
                raise BadVector(f"there is no layer {layer}; the model's layers are 0 to {len(self.blocks) - 1}")
        return sorted(set(layers))

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

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[list[int]],
        vectors: Vectors | None = None,
        scale: float = 0.0,
        *,
        temperature: float = 0.0,
        seed: int = 0,
        most: int = 1024,
        thinking_only: bool = False,
    ) -> list[Written]:
        """A completion per prompt, `scale * vector` added at each prompt's last token and all that follow it.

        Temperature 0 is greedy. With `thinking_only` nothing is added once a row has closed its thinking.
        """
        batch = _Batch(self, prompts, most, temperature, seed, thinking_only)

        def steer(layer: int, hidden: Tensor) -> Tensor:
            changed = hidden.clone()
            changed[:, -1] += scale * batch.steered[:, None] * moved[layer]
            return changed

        moved = {layer: vector.to(self.device) for layer, vector in (vectors or {}).items()} if scale else {}
        with ExitStack() as stack:
            for layer in moved:
                stack.enter_context(self.hooked(layer, steer))
            while batch.rows:
                batch.step()
        return [self._written(tokens) for tokens in batch.written]

    def _written(self, tokens: list[int]) -> Written:
        closed = self.close in tokens
        end = tokens.index(self.close) if closed else len(tokens)  # type: ignore[arg-type]
        return Written(tokens, [token for token in tokens[:end] if token not in self.ends], closed)


class _Batch:
    """Prompts padded on the left, written on token by token; rows that have ended are taken out."""

    def __init__(
        self, owner: Model, prompts: Sequence[list[int]], most: int, temperature: float, seed: int, thinking: bool
    ) -> None:
        self._owner, self._most, self._temperature, self._thinking = owner, most, temperature, thinking
        self._random = torch.Generator(owner.device).manual_seed(seed)
        self.rows = list(range(len(prompts)))
        self.written: list[list[int]] = [[] for _ in prompts]
        width = max(map(len, prompts), default=0)
        lengths = torch.tensor([len(each) for each in prompts], device=owner.device)
        self._ids = torch.tensor([[0] * (width - len(each)) + each for each in prompts], device=owner.device)
        self._mask = (torch.arange(width, device=owner.device) >= width - lengths[:, None]).long()
        self.steered = torch.ones(len(prompts), device=owner.device)
        self._cache: Any = None

    def step(self) -> None:
        """One token for every row that is left."""
        places = (self._mask.cumsum(1) - 1).clamp(min=0)[:, -self._ids.shape[1] :]
        out = self._owner.model(
            self._ids, attention_mask=self._mask, position_ids=places, past_key_values=self._cache, use_cache=True,
            logits_to_keep=1,
        )  # fmt: skip
        self._cache = out.past_key_values
        drawn = self._draw(out.logits[:, -1])
        for row, token in zip(self.rows, drawn.tolist(), strict=True):
            self.written[row].append(token)
        if self._thinking and self._owner.close is not None:
            self.steered = self.steered * (drawn != self._owner.close)
        self._ids = drawn[:, None]
        self._mask = torch.cat([self._mask, torch.ones_like(self._ids)], 1)
        self._drop_ended()

    def _draw(self, logits: Tensor) -> Tensor:
        if self._temperature == 0:
            return logits.argmax(-1)
        chances = torch.softmax(logits.float() / self._temperature, -1)
        return torch.multinomial(chances, 1, generator=self._random)[:, 0]

    def _drop_ended(self) -> None:
        tails = [self.written[row] for row in self.rows]
        going = [i for i, tail in enumerate(tails) if tail[-1] not in self._owner.ends and len(tail) < self._most]
        if len(going) == len(self.rows):
            return
        kept = torch.tensor(going, device=self._owner.device, dtype=torch.long)
        self.rows = [self.rows[index] for index in going]
        self._ids, self._mask, self.steered = self._ids[kept], self._mask[kept], self.steered[kept]
        if going:
            self._cache.batch_select_indices(kept)


def _blocks(model: nn.Module) -> Sequence[nn.Module]:
    """The transformer blocks: the one list of modules that is as long as the configuration says."""
    count = model.config.get_text_config().num_hidden_layers  # type: ignore[union-attr, operator]
    found = [each for each in model.modules() if isinstance(each, nn.ModuleList) and len(each) == count]
    if not found:
        raise BadVector("the model's blocks cannot be found")
    return list(found[0])
