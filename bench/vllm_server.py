"""The baseline: vLLM's own OpenAI server, given every setting that makes ours fast, so that only the servers differ.

Same weights and dtype, eager or compiled alike, same KV size, block size, batch size and context, prefix caching,
single-process executor with one OpenMP thread (on a GPU: vLLM's defaults, as ours); request and access logs are off.
The reasoning parser is on because our server splits thinking from the answer too.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping

from bench.servers import Launch
from thinkserve.server.deployment import CPU_KV_GIB
from thinkserve.server.model_dir import find_model
from thinkserve.server.settings import Settings
from thinkserve.server.vllm_args import dtype


def vllm_server(model: str, *, cpu: bool) -> Launch:
    """vLLM's server with our engine's settings."""
    command = [sys.executable, "-W", "ignore", "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    command += ["--served-model-name", "baseline", "--dtype", dtype(Settings(), find_model(model), cpu)]
    command += ["--max-num-seqs", _default("max_num_seqs")]
    command += ["--enable-prefix-caching", "--reasoning-parser", "qwen3"]
    command += ["--disable-uvicorn-access-log", "--uvicorn-log-level", "warning"]
    return Launch("vllm", (*command, *(_cpu_flags() if cpu else ())), environment(cpu))


def _default(name: str) -> str:
    """Our server's default of a setting."""
    return str(Settings.model_fields[name].default)


def _cpu_flags() -> tuple[str, ...]:
    executor = ("--distributed-executor-backend", "uni")
    return ("--enforce-eager", "--block-size", "32", "--kv-cache-memory-bytes", str(int(CPU_KV_GIB * 2**30)), *executor)


def environment(cpu: bool) -> Mapping[str, str]:
    """What our server sets for its engine as well; without the last two, vLLM on a CPU is slower."""
    env = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
    return env | ({"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1"} if cpu else {})
