"""From a bound socket to the exit code: serving, draining on SIGTERM, and what happens when the engine dies.

Drain: no new work, what runs goes on; after `drain_timeout_s` strategies decide with what they have; what is still
there a moment later is cut off with an error event. A second signal cuts off at once. A dead engine ends the server
with exit code 1, after its clients have been told.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import anyio
import uvicorn
from anyio import CancelScope, create_task_group, move_on_after, sleep

from thinkserve.server.app import create_app
from thinkserve.server.http_protocol import Protocol
from thinkserve.server.middleware import MAX_HEADER_BYTES
from thinkserve.server.model_dir import StartError
from thinkserve.server.plan import Backend
from thinkserve.server.probes import watch_lag
from thinkserve.server.runner import GRACE_S
from thinkserve.server.settings import Settings
from thinkserve.server.state import ServerState
from thinkserve.strategies.engine import Role

logger = logging.getLogger("thinkserve")

FAREWELL_S = 2.0
SIGNALS = (signal.SIGTERM, signal.SIGINT)


def reserve_socket(host: str, port: int) -> socket.socket:
    """Bind before the weights load, so that a taken port costs no minute. Raises StartError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        # Only a listening socket is refused to a second server that binds the same way.
        listener.listen(1)
    except OSError as error:
        listener.close()
        raise StartError(f"Cannot listen on {host}:{port}: {error.strerror or error}") from error
    return listener


class _Uvicorn(uvicorn.Server):
    """uvicorn that says when it is ready, and without its signal handlers: ours decide when it ends."""

    ready: Callable[[], None]

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Server:
    """One server process; `run` returns its exit code. In threads other than the main one, call `stop` for a signal."""

    def __init__(self, settings: Settings, backend: Backend, listener: socket.socket) -> None:
        self.app = create_app(settings, backend)
        self.state: ServerState = self.app.state.server
        self._listener = listener
        self._uvicorn = _Uvicorn(_config(self))
        self._stops = 0
        self._stopping = asyncio.Event()
        self._draining = CancelScope()
        self._exit = 0

    @property
    def url(self) -> str:
        """Where the server listens."""
        host, port = self._listener.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    async def run(self, ready: Callable[[], None] = lambda: None) -> int:
        """Serve until stopped; `ready` is called once requests are answered. Closes the backend and the socket."""
        async with create_task_group() as group:
            if threading.current_thread() is threading.main_thread():
                group.start_soon(self._signals)
            group.start_soon(watch_lag, self.state.metrics)
            group.start_soon(self._watch_engine)
            group.start_soon(self._end_when_stopped)
            self._uvicorn.ready = ready
            await self._uvicorn.serve(sockets=[self._listener])
            group.cancel_scope.cancel()
        return self._exit

    def stop(self) -> None:
        """Drain; when called again, cut off what is left."""
        self._stops += 1
        self.state.admission.drain()
        self._stopping.set()
        if self._stops > 1:
            self.state.runner.abort()
            # Those that are not at work yet are not waited for either.
            self._draining.cancel()

    async def _signals(self) -> None:
        with anyio.open_signal_receiver(*SIGNALS) as received:
            async for number in received:
                logger.warning("received %s", signal.Signals(number).name)
                self.stop()

    async def _watch_engine(self) -> None:
        told = set[Role]()
        while True:
            await sleep(1.0)
            if self._uvicorn.should_exit:
                return
            if not self.state.backend.alive:
                break
            lost = {role for role, model in self.state.backend.roles.items() if not model.alive}
            for role in sorted(lost - told):
                logger.error(
                    "the model that serves the role %s is gone; strategies that need it are not available", role
                )
            told = lost
        logger.error("the engine is gone; the server ends")
        self._exit = 1
        self.state.admission.drain()
        await self._idle_within(FAREWELL_S)
        self._stops = 2
        self._stopping.set()

    async def _end_when_stopped(self) -> None:
        await self._stopping.wait()
        runner, settings = self.state.runner, self.state.settings
        logger.warning("draining: %d requests at work", runner.live)
        if self._stops == 1:
            with self._draining:
                await self._idle_within(settings.drain_timeout_s)
                runner.decide()
                await self._idle_within(GRACE_S + 0.5)
        runner.abort()
        await self._idle_within(FAREWELL_S)
        self._uvicorn.should_exit = True

    async def _idle_within(self, seconds: float) -> None:
        with move_on_after(seconds):
            await self.state.admission.idle()


def _config(server: Server) -> uvicorn.Config:
    return uvicorn.Config(
        server.app,
        http=Protocol,
        ws="none",
        lifespan="on",
        loop="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=server.state.settings.idle_timeout_s,
        timeout_graceful_shutdown=5,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        backlog=2048,
    )
