"""What vLLM is told of a model: the arguments of its engine, by what the model is for.

The target is steered and guided by its budget predictor; helpers write plainly; a reward model pools.
"""

from __future__ import annotations

from typing import Any

from thinkserve.server.deployment import GIB, Local
from thinkserve.server.model_dir import ModelDir
from thinkserve.server.reward_formats import format_of
from thinkserve.server.settings import Settings
from thinkserve.server.vllm_controls import COLUMNS
from thinkserve.server.vllm_guidance import find_predictor
from thinkserve.server.vllm_worker import KEY, STATS

# Steering vectors that the engine holds at once.
STEERING_SLOTS = 64
VALUE_HEAD = "thinkserve.server.vllm_value_head.Extension"
# vLLM's word for: as long as the model allows and the cache can hold.
FITTED = -1


def engine_args(settings: Settings, place: Local, cpu: bool) -> dict[str, Any]:
    """The arguments of AsyncEngineArgs."""
    args: dict[str, Any] = {
        "model": str(place.model.path),
        "served_model_name": place.name,
        "dtype": dtype(settings, place.model, cpu),
        "max_model_len": settings.max_model_len if place.target else FITTED,
        "max_num_seqs": settings.max_num_seqs,
        "gpu_memory_utilization": place.gpu_share,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "enforce_eager": eager(settings, cpu),
        "enable_prefix_caching": True,
        "use_tqdm_on_load": False,
    }
    if place.kv_gib is not None:
        args["kv_cache_memory_bytes"] = int(place.kv_gib * GIB)
    if cpu:
        # The CPU attention kernel works on blocks of 32 tokens and multiples.
        args["block_size"] = 32
    if cpu and place.model.small:
        args["distributed_executor_backend"] = "uni"
    return args | (_rating(place.model) if "reward" in place.roles else _writing(settings, place))


def _writing(settings: Settings, place: Local) -> dict[str, Any]:
    steers = settings.steering and place.target
    wish = {"slots": STEERING_SLOTS, "columns": COLUMNS, "exact": settings.steering_exact}
    steering = {"steering": wish} if steers else {}
    predictor = find_predictor(settings, place.model) if place.target else None
    guidance = {"guidance": {"folder": str(predictor)}} if predictor else {}
    # Hashed into the key of vLLM's cache of compiled models.
    additional = {KEY: {STATS: {}, **steering, **guidance}}
    return {"additional_config": additional, "reasoning_config": _reasoning(settings, place.model)}


def _rating(model: ModelDir) -> dict[str, Any]:
    """A reward model gives the logits of every token; STEP pooling would end the engine when the cache is read."""
    from vllm.config import PoolerConfig

    return {
        "runner": "pooling",
        "pooler_config": PoolerConfig(tok_pooling_type="ALL", use_activation=False),
        "hf_overrides": {"num_labels": format_of(model).labels},
        **({"worker_extension_cls": VALUE_HEAD} if model.architecture == "Qwen2ForPrmModel" else {}),
    }


def eager(settings: Settings, cpu: bool) -> bool:
    """Whether the model runs as it is written, not compiled."""
    return cpu if settings.enforce_eager is None else settings.enforce_eager


def dtype(settings: Settings, model: ModelDir, cpu: bool) -> str:
    """A CPU without bfloat16 arithmetic computes a small model up to three times faster in float32 (measured)."""
    import torch

    slow = cpu and not torch.cpu._is_avx512_bf16_supported()
    return "float32" if settings.dtype == "auto" and model.small and slow else settings.dtype


def _reasoning(settings: Settings, model: ModelDir) -> Any:
    """vLLM's forcing of the end of thinking, when the tokenizer has the tags as tokens."""
    from vllm.config.reasoning import ReasoningConfig

    if not model.has_tokens(settings.reasoning_open, settings.reasoning_close):
        return None
    return ReasoningConfig(
        reasoning_start_str=settings.reasoning_open,
        reasoning_end_str=settings.reasoning_close,
    )
