"""Everything that can be wrong before the engine's slow imports: the operator is told at once, in one line."""

from __future__ import annotations

from collections.abc import Mapping
from ctypes import CDLL
from dataclasses import dataclass

from thinkserve.server.auth import load_keys
from thinkserve.server.choice import check_settings, preset_choice, resolve
from thinkserve.server.deployment import Deployment, plan_models
from thinkserve.server.model_dir import ModelDir, StartError
from thinkserve.server.needs import lacking
from thinkserve.server.settings import RemoteSettings, Settings
from thinkserve.server.vllm_guidance import predictor_folder
from thinkserve.server.vllm_launch import is_cpu_build
from thinkserve.strategies.registry import Need

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
    """Check the engine, the keys, the models and the presets against each other. Raises StartError."""
    cpu = is_cpu_build()
    if cpu:
        _refuse_gpu_options(settings)
        check_libraries()
    load_keys(settings)
    deployment = plan_models(settings, cpu)
    if deployment.remote:
        from thinkserve.server.remote_engine import check_access

        for remote in deployment.remote:
            check_access(settings.remote.get(remote.role, RemoteSettings()), remote.role)
    check_names(settings, deployment)
    return Checked(deployment, cpu)


def check_names(settings: Settings, deployment: Deployment) -> None:
    """Check that presets, effort map and default strategy name what exists, and what clients get unasked can run.

    Raises StartError.
    """
    try:
        check_settings(settings, deployment.target.name)
    except ValueError as error:
        raise StartError(str(error)) from None
    unasked = {"default_strategy": resolve(settings.default_strategy, {}, settings, where="default_strategy")}
    for effort, name in settings.effort_map.items():
        unasked[f"effort_map.{effort}"] = preset_choice(name, settings, "effort_map")
    served = {role for place in deployment.local for role in place.roles} | {each.role for each in deployment.remote}
    for where, choice in unasked.items():
        needed = {*choice.strategy.roles, *(role for layer in choice.over for role in layer.modifier.roles)}
        needed |= {*choice.options.roles().values()}
        if missing := needed - served:
            raise StartError(f"{where} needs a model that is not configured: {', '.join(sorted(missing))}")
        if reason := lacking(choice.strategy, abilities(settings, deployment.target.model)):
            raise StartError(f"{where}: {choice.strategy.id} is not available: {reason}")
        if (chains := choice.options.chains()) > settings.max_chains:
            raise StartError(f"{where} runs {chains} chains; max_chains allows {settings.max_chains}")


def abilities(settings: Settings, model: ModelDir) -> Mapping[Need, bool]:
    """What the engine will be able to do; whether a predictor that is there fits is checked when it is loaded."""
    return {"steering": settings.steering, "guidance": predictor_folder(settings, model) is not None}


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
