"""Sampling from an exported model with vLLM: what is evaluated is what will be served, and it is many times faster."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from thinkserve.train.loop import fast_bf16
from thinkserve.train.model import default_device

KV_BYTES = 2**30


class VllmSampler:
    """Completions of token prompts by the model in `folder`; eos included."""

    def __init__(self, folder: Path) -> None:
        os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1")
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        from vllm import LLM

        torch.set_num_threads(1)
        self._llm: Any = LLM(
            model=str(folder.resolve()),
            enforce_eager=True,
            dtype="bfloat16" if fast_bf16(default_device()) else "float32",
            max_num_seqs=256,
            kv_cache_memory_bytes=KV_BYTES,
            distributed_executor_backend="uni",
            disable_log_stats=True,
        )

    def __call__(self, prompts: list[list[int]], *, temperature: float, seed: int, most: int = 2048) -> list[list[int]]:
        """One completion of at most `most` tokens per prompt; temperature 0 is greedy. `seed` starts the sequence."""
        from vllm import SamplingParams, TokensPrompt

        torch.manual_seed(seed)
        params = SamplingParams(temperature=temperature, max_tokens=most, detokenize=False)
        outputs = self._llm.generate([TokensPrompt(prompt_token_ids=ids) for ids in prompts], params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]
