"""The engine's own life: it starts only on the vLLM it knows, its death is noticed, it never outlives its server."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from time import monotonic, sleep

import pytest

from thinkserve.server import vllm_launch
from thinkserve.server.model_dir import EMBEDDED, MODELS, StartError

# Starts an engine, kills its process in the middle of a job, and reports what the server sees of it.
DEATH = """
import asyncio, json, multiprocessing, os, signal
from thinkserve.server.settings import Settings
from thinkserve.server.vllm_engine import create
from thinkserve.strategies.engine import Job
from thinkserve.strategies.errors import EngineDead

async def job(backend):
    try:
        async with backend.engine("doomed").generate(Job((5, 6, 7), 4000, stop_tokens=())) as stream:
            async for delta in stream:
                core = multiprocessing.active_children()[0].pid
                os.kill(core, signal.SIGKILL)
        return "finished"
    except EngineDead:
        return "dead"

async def main():
    backend = await create(Settings(kv_cache_gib=0.1))
    said = {"before": backend.alive, "running": await job(backend), "after": backend.alive, "next": await job(backend)}
    try:
        await backend.check()
    except EngineDead:
        said["check"] = "dead"
    await backend.aclose()
    await backend.aclose()
    print(json.dumps(said | {"left": len(multiprocessing.active_children())}))

asyncio.run(main())
"""

# Forks as vLLM's launch does, then dies without a chance to clean up.
KILLED = """
import os, signal, sys, time
from thinkserve.server.vllm_fork import children_die_with_us

with children_die_with_us():
    child = os.fork()
if child == 0:
    time.sleep(60)
print(child, flush=True)
time.sleep(0.2)
os.kill(os.getpid(), signal.SIGKILL)
"""


# Starts an engine that cannot be started and prints what the operator is told.
REFUSED = """
import asyncio, json, sys
from thinkserve.server.model_dir import StartError
from thinkserve.server.settings import Settings
from thinkserve.server.vllm_engine import create

async def main():
    try:
        await create(Settings(kv_cache_gib=0.1, **json.loads(sys.argv[1])))
    except StartError as error:
        print(error)

asyncio.run(main())
"""


def running(stat: Path) -> bool:
    """Whether the process of a /proc/*/stat file still runs."""
    try:
        return stat.read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_the_death_of_the_engine_is_noticed() -> None:
    """The running job fails at once, the next one too, health says so, and stopping works and leaves no process."""
    done = subprocess.run([sys.executable, "-c", DEATH], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "before": True, "running": "dead", "after": False, "next": "dead", "check": "dead", "left": 0,
    }  # fmt: skip
    assert "Exception ignored" not in done.stderr


def refusal(**settings: object) -> str:
    """What is said of settings that no engine starts with, without the name of the model."""
    told = [sys.executable, "-c", REFUSED, json.dumps(settings)]
    done = subprocess.run(told, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.startswith("The engine did not start with ")
    assert 1 == done.stdout.count("\n")
    return done.stdout.partition(": ")[2].rstrip()


def test_a_setting_that_the_engine_refuses_is_told_in_its_own_words() -> None:
    """And not that there is one error in its configuration."""
    assert "User-specified max_model_len (8192) is greater than" in refusal(max_model_len=8192)


def test_what_the_worker_refuses_is_told_in_its_own_words(tmp_path: Path) -> None:
    """Deep inside the engine's process, of which vLLM says only that it failed."""
    shutil.copytree(MODELS / EMBEDDED, tmp_path / "model")
    weights = tmp_path / "model" / "budget" / "predictor.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])

    assert refusal(model=str(tmp_path / "model")) == f"damaged budget predictor: {weights}"


def test_a_forked_engine_dies_with_a_killed_server() -> None:
    """No orphan: the child is gone, or a zombie that nobody reaps."""
    done = subprocess.run([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, text=True, timeout=30, check=False)
    assert done.returncode == -signal.SIGKILL
    stat = Path(f"/proc/{int(done.stdout)}/stat")
    until = monotonic() + 20
    while (alive := running(stat)) and monotonic() < until:
        sleep(0.02)
    assert not alive


def test_a_missing_name_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that a module lacks, and a module that is not there; modules of the library stand in for vLLM's."""
    # To import vLLM here would be to import it without its environment, before the session's engine does.
    for module, name in (("json", "JSONDecoder.gone"), ("json.gone", "anything")):
        with pytest.raises(StartError, match=rf"^This vLLM has no {module}.*0\.32\.x$"):
            vllm_launch.check_names({module: (name,)})


def test_another_vllm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another minor version, and none at all."""
    monkeypatch.setattr(vllm_launch, "VLLM_MINOR", "0.99.")
    with pytest.raises(StartError, match=r"written for 0\.99\.x"):
        vllm_launch.is_cpu_build()
    monkeypatch.setattr(vllm_launch, "PACKAGES", ("no-such-vllm",))
    with pytest.raises(StartError, match="not installed"):
        vllm_launch.is_cpu_build()
