"""From settings to a running server, fast to fail and then fast to start.

The order is the point: check everything that can be checked, take the port, load the engine, build the app, say where.
"""

from __future__ import annotations

import os
import signal
import socket
from functools import partial
from time import monotonic

import anyio
from rich.console import Console

from thinkserve.server import banner, logs
from thinkserve.server.discovery import runs
from thinkserve.server.lifecycle import Server, reserve_socket
from thinkserve.server.preflight import Checked, check
from thinkserve.server.roles import create
from thinkserve.server.settings import Settings
from thinkserve.strategies.equivalence import shared


def run(settings: Settings, console: Console) -> int:
    """Serve until a signal or the engine's end; the exit status. Raises StartError before anything slow if it can."""
    begin = monotonic()
    checked = check(settings)
    listener = reserve_socket(settings.host, settings.port)
    os.register_at_fork(after_in_child=partial(_leave, listener))
    logs.set_up(settings.log_json)
    banner.loading_models(console, checked.deployment, checked.cpu)
    return anyio.run(_serve, settings, checked, listener, console, begin, backend_options={"use_uvloop": True})


def _leave(listener: socket.socket) -> None:
    """In a forked engine process: neither keep the port open nor pass its signals on to this process's event loop."""
    listener.close()
    signal.set_wakeup_fd(-1)


async def _serve(settings: Settings, checked: Checked, listener: socket.socket, console: Console, begin: float) -> int:
    with banner.loading(console):
        backend = await create(settings, checked.deployment)
    server = Server(settings, backend, listener)
    url = banner.address(settings.host, listener.getsockname()[1])
    keyed = bool(settings.api_keys or settings.api_keys_file)
    preset = next((name for name in settings.presets if runs(server.state, name)), None)

    def ready() -> None:
        banner.loaded_models(console, checked.deployment, backend.roles)
        banner.started(console, url, checked.served, preset, monotonic() - begin, keyed)

    async with anyio.create_task_group() as group:
        if not checked.deployment.target.model.small:
            # Answers of a small model are numbers and words; those of others may need algebra at the first vote.
            group.start_soon(shared().warm)
        status = await server.run(ready)
        group.cancel_scope.cancel()
    return status
