"""Servers under test: started as a user starts them, asked until they answer, ended with everything they started.

Two servers that work on the same cores would measure each other, so only one is asked at a time. Each runs in a process
group of its own and logs to a file; its working directory is the log's, so that nothing of the checkout is imported by
accident.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

import anyio
from anyio.abc import Process

from bench.client import Address, BadReply, Reply, get, post

START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 30.0
POLL_S = 0.05


class NotStarted(Exception):
    """A server that ended, or did not answer in time; the message holds the end of its log."""


@dataclass(frozen=True, slots=True)
class Launch:
    """How to start a server: its command line without the port, and what is added to the environment."""

    name: str
    command: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, slots=True)
class Server:
    """A server that answers: where, the name of its model, seconds from process start to its first answered chat."""

    address: Address
    model: str
    first_answer_s: float


def thinkserve(model: str) -> Launch:
    """Our server, as its command line starts it; every setting is its default."""
    return Launch("thinkserve", (sys.executable, "-m", "thinkserve.server", "serve", model))


def family() -> Launch:
    """Our server as `make serve` starts it: the embedded family in all roles, three engines."""
    return Launch("thinkserve, all roles", (sys.executable, "-m", "thinkserve.server", "serve"))


def free_port() -> int:
    """A port of the loopback interface that nobody listens on now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@asynccontextmanager
async def running(launch: Launch, log: Path) -> AsyncIterator[Server]:
    """Start a server and wait for its first answer; leaving the block ends it. Raises NotStarted."""
    log.parent.mkdir(parents=True, exist_ok=True)
    address = Address("127.0.0.1", free_port())
    command = (*launch.command, "--host", address.host, "--port", str(address.port))
    start = perf_counter()
    with log.open("ab") as output:
        process = await anyio.open_process(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=log.parent,
            env=os.environ | launch.env,
            start_new_session=True,
        )
    try:
        model = await _first_answer(process, address, log)
        yield Server(address, model, perf_counter() - start)
    finally:
        with anyio.CancelScope(shield=True):
            await _stop(process)


async def _first_answer(process: Process, address: Address, log: Path) -> str:
    """Ask until a chat is answered; the name of the model that answered it."""
    refused = "no answer from the server"
    with anyio.move_on_after(START_TIMEOUT_S):
        while process.returncode is None:
            try:
                model = str((await get(address, "/v1/models")).json()["data"][0]["id"])
                reply = await _chat(address, model)
            except (OSError, BadReply):
                await anyio.sleep(POLL_S)
                continue
            if reply.status == 200:
                return model
            if reply.status != 503:
                refused = f"the server answered {reply.status}: {reply.body[:500].decode(errors='replace')}"
                break
    raise NotStarted(f"{refused} (exit status {process.returncode}):\n{_tail(log)}")


async def _chat(address: Address, model: str) -> Reply:
    messages = [{"role": "user", "content": "What is 2 + 3?"}]
    body = {"model": model, "messages": messages, "max_completion_tokens": 16}
    return await post(address, "/v1/chat/completions", body)


def _tail(log: Path, lines: int = 20) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


async def _stop(process: Process) -> None:
    """Ask the server to end, wait, then end what is left of its process group."""
    with suppress(ProcessLookupError):
        process.terminate()
    with anyio.move_on_after(STOP_TIMEOUT_S):
        await process.wait()
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()
