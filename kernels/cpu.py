"""Builds and loads the C++ forms of the kernels (csrc/<name>.cpp) for the processor that they run on.

A kernel is compiled on first use, for the vector instructions that this machine has, into a folder of the user's cache
whose name holds everything the result depends on; later processes load it in milliseconds. Without a compiler there is
no C++ form, and the caller takes PyTorch's. `python -m thinkserve.kernels.cpu` compiles everything beforehand.

Environment: `THINKSERVE_KERNELS=0` switches the C++ forms off; `THINKSERVE_CACHE` moves the folder (default:
`$XDG_CACHE_HOME/thinkserve`, else `~/.cache/thinkserve`).
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

SOURCES = Path(__file__).resolve().parent / "csrc"
TIMEOUT = 300.0

# Products and sums are rounded one by one (no contraction): the C++ forms equal PyTorch's bit for bit.
_FLAGS = ("-std=c++20", "-O3", "-fPIC", "-shared", "-fopenmp", "-ffp-contract=off", "-DAT_PARALLEL_OPENMP=1")
_VECTOR_FLAGS = {
    "DEFAULT": (),
    "AVX2": ("-mavx2", "-mfma", "-mf16c"),
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"),
}
_log = logging.getLogger(__name__)


@functools.cache
def op(name: str) -> Callable[..., Any] | None:
    """The C++ form of a kernel as an op (`torch.ops.thinkserve_cpu.<name>`), or None where there is none.

    The first call ever compiles (10 to 15 s of a core); a failure is logged once with the compiler's words. A server
    calls `prepare` before it serves.
    """
    if os.environ.get("THINKSERVE_KERNELS") == "0":
        return None
    try:
        torch.ops.load_library(str(_built(name)))  # type: ignore[no-untyped-call]
    except (OSError, subprocess.SubprocessError) as error:
        _log.warning("%s: no C++ form, PyTorch's is used: %s", name, _first_error(error))
        return None
    found: Callable[..., Any] = getattr(torch.ops.thinkserve_cpu, name).default
    return found


def _first_error(error: Exception) -> str:
    """The compiler's first complaint, or the error itself."""
    said = (getattr(error, "stderr", None) or "").splitlines()
    return next((line for line in said if "error" in line), str(error))


def prepare() -> dict[str, bool]:
    """Compile and load everything that has a C++ form, as many at a time as there are cores: name -> is it there."""
    names = sorted(source.stem for source in SOURCES.glob("*.cpp"))
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return {name: found is not None for name, found in zip(names, pool.map(op, names), strict=True)}


def _built(name: str) -> Path:
    """The library of one kernel, compiled if it is not in the cache; processes may race, each for a whole file."""
    command = _command(SOURCES / f"{name}.cpp")
    library = _cache() / f"{name}-{_digest(name, command)}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            made = Path(folder) / library.name
            whole = [*command, "-o", str(made)]
            subprocess.run(whole, check=True, capture_output=True, text=True, timeout=TIMEOUT)  # noqa: S603 ours
            made.replace(library)
    return library


def _command(source: Path) -> list[str]:
    from torch.utils.cpp_extension import include_paths, library_paths

    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        raise FileNotFoundError("no C++ compiler")
    capability = torch.backends.cpu.get_cpu_capability()
    if capability not in _VECTOR_FLAGS:
        capability = "DEFAULT"
    flags = [*_FLAGS, f"-DCPU_CAPABILITY={capability}", f"-DCPU_CAPABILITY_{capability}", *_VECTOR_FLAGS[capability]]
    includes = [f"-isystem{path}" for path in include_paths()]
    libraries = [f"-L{path}" for path in library_paths()]
    return [compiler, *flags, *includes, str(source), *libraries, "-lc10", "-ltorch_cpu"]


def _digest(name: str, command: list[str]) -> str:
    parts = [*command, torch.__version__, platform.machine()]
    digest = hashlib.sha256("\0".join(parts).encode())
    for source in (SOURCES / f"{name}.cpp", *sorted(SOURCES.glob("*.h"))):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _cache() -> Path:
    home = os.environ.get("THINKSERVE_CACHE")
    # An empty variable counts as none: code is never loaded from below the working directory.
    base = Path(home) if home else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "thinkserve"
    return base / "kernels"


if __name__ == "__main__":
    for kernel, ready in prepare().items():
        print(f"{kernel}: {'ready' if ready else 'no C++ form'}")
