"""Everything that can be wrong before the engine's slow imports: the operator is told at once, in one line."""

from __future__ import annotations

from ctypes import CDLL
from dataclasses import dataclass
from pathlib import Path

from thinkserve.server.choice import check_settings
from thinkserve.server.deployment import Deployment, plan_models
from thinkserve.server.model_dir import StartError
from thinkserve.server.settings import Settings
from thinkserve.server.vllm_launch import is_cpu_build

GPU_ONLY = ("gpu_memory_utilization", "tensor_parallel_size")


@dataclass(frozen=True, slots=True)
class Checked:
    """What is known to be in order: the models, and which kind of engine there is."""

    deployment: Deployment
    cpu: bool

    @property
    def served(self) -> str:
        """The target's name on the wire."""
        return self.deployment.target.name


def check(settings: Settings) -> Checked:
    """Check the engine, the models, the presets and the key file against each other. Raises StartError."""
    cpu = is_cpu_build()
    if cpu:
        _refuse_gpu_options(settings)
        check_libraries()
    for name in ("api_keys_file", "admin_keys_file"):
        if (file := getattr(settings, name)) is not None:
            _check_keys(name, file)
    deployment = plan_models(settings, cpu)
    check_names(settings, deployment.target.name)
    return Checked(deployment, cpu)


def check_names(settings: Settings, served: str) -> None:
    """Check that presets, effort map and default strategy name what exists. Raises StartError."""
    try:
        check_settings(settings, served)
    except ValueError as error:
        raise StartError(str(error)) from None


def check_libraries() -> None:
    """Check for the one system library that vLLM's CPU kernels need and no Python package brings. Raises StartError."""
    try:
        CDLL("libnuma.so.1")
    except OSError:
        raise StartError("libnuma.so.1 is missing; install it (Debian, Ubuntu: package libnuma1)") from None


def _refuse_gpu_options(settings: Settings) -> None:
    for name in GPU_ONLY:
        if getattr(settings, name) != Settings.model_fields[name].default:
            raise StartError(f"{name} needs a GPU, but the engine is vLLM's CPU build (ENGINE=cuda installs the other)")


def _check_keys(name: str, file: Path) -> None:
    try:
        keys = file.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise StartError(f"Cannot read {name} {file}: {getattr(error, 'strerror', 'not text')}") from None
    if not keys:
        raise StartError(f"{name} {file} holds no key; leave the setting out instead")
