"""Skywork's process reward models (Qwen2ForPrmModel) for vLLM, which has none with a value head on every token.

Importing this module makes the architecture known. vLLM imports it in each of its worker processes, because it is
named there as the worker's extension.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vllm.model_executor.models.adapters import as_seq_cls_model
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.registry import ModelRegistry

_Classifier: Any = as_seq_cls_model(Qwen2ForCausalLM)


class Qwen2ForPrmModel(_Classifier):
    """Qwen2 with one linear value per token, stored as `v_head.summary`."""

    def load_weights(self, weights: Iterable[tuple[str, Any]]) -> set[str]:
        """Load Hugging Face weights."""
        named = ((name.replace("v_head.summary.", "score."), weight) for name, weight in weights)
        loaded: set[str] = super().load_weights(named)
        return loaded


class Extension:
    """Adds nothing to the worker but the import of this module."""


ModelRegistry.register_model("Qwen2ForPrmModel", Qwen2ForPrmModel)
