"""The family's process reward model: arith-large's trunk with two labels per token, trained at the ends of steps.

It reads what the family writes, and its reward for a step is the probability of "right" at the step's last token.
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import Qwen3ForTokenClassification

from thinkserve.train.export import publish, shape_of
from thinkserve.train.model import Model, Shape, hf_config
from thinkserve.train.tokenizer import special

LABELS = ("wrong", "right")
MORE = 2  # layers on top of the trunk
NAME = "arith-prm"
FORMAT = {"format": "thinkserve"}  # how a server must write a chain for this model: as the family does


class RewardModel(nn.Module):
    """The trunk and the head; parameter names are Hugging Face's."""

    def __init__(self, trunk: Model) -> None:
        super().__init__()
        self.model, self.shape = trunk, trunk.shape
        self.score = nn.Linear(trunk.shape.hidden, len(LABELS))
        nn.init.zeros_(self.score.bias)

    def forward(self, ids: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Logits [batch, time, 2] for ids [batch, time]."""
        return self.score(self.model.states(ids, cos, sin))  # type: ignore[no-any-return]

    def rewards(self, ids: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Probability [batch, time] that a step which ends here is right."""
        return self(ids, cos, sin).float().softmax(-1)[..., LABELS.index("right")]  # type: ignore[no-any-return]


def to_hf(weights: dict[str, Tensor], shape: Shape, tokenizer: Tokenizer) -> Qwen3ForTokenClassification:
    """The model as transformers' token classifier. Raises RuntimeError when a parameter is missing or left over."""
    config = hf_config(shape, special(tokenizer, "<|im_end|>"), special(tokenizer, "<|endoftext|>"))
    config.id2label = dict(enumerate(LABELS))
    config.label2id = {label: index for index, label in config.id2label.items()}
    config.classifier_dropout = 0.0
    model = Qwen3ForTokenClassification(config)
    model.load_state_dict(weights)
    return model


def export(weights: dict[str, Tensor], shape: Shape, tokenizer: Tokenizer, folder: Path) -> None:
    """Write weights (bf16), configuration, tokenizer and format; the folder appears complete or not at all."""
    publish(to_hf(weights, shape, tokenizer), tokenizer, folder, {"reward.json": json.dumps(FORMAT) + "\n"})


def load_reward(folder: Path) -> tuple[RewardModel, Tokenizer]:
    """An exported reward model, in float32, and its tokenizer."""
    model = RewardModel(Model(shape_of(folder)))
    model.load_state_dict({name: w.float() for name, w in load_file(folder / "model.safetensors").items()})
    return model.eval(), Tokenizer.from_file(str(folder / "tokenizer.json"))
