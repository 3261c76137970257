"""A real server on a real socket for the HTTP tests: uvicorn in a thread, ScriptedEngine behind it."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from time import monotonic, sleep
from typing import Any

import anyio
import httpx
import pytest

from thinkserve.server.lifecycle import Server, reserve_socket
from thinkserve.server.settings import Settings
from thinkserve.server.testing import ScriptedBackend
from thinkserve.strategies.testing import ScriptedEngine


class Running:
    """A server at work in a thread of its own."""

    def __init__(self, engine: ScriptedEngine, backend: ScriptedBackend | None = None, **settings: Any) -> None:
        self.engine = engine
        self.backend = backend or ScriptedBackend(engine)
        self.listener = reserve_socket("127.0.0.1", 0)
        self.port: int = self.listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.exit: int | None = None
        self._settings = Settings(served_name="m", **settings)
        self._ready = threading.Event()
        self._thread = threading.Thread(target=anyio.run, args=(self._main,))
        self._thread.start()
        assert self._ready.wait(20)
        self.client = httpx.Client(base_url=self.url, timeout=20)

    async def _main(self) -> None:
        self.server = Server(self._settings, self.backend, self.listener)
        self._token = anyio.lowlevel.current_token()
        self.exit = await self.server.run(self._ready.set)

    def call(self, function: Callable[[], Any]) -> Any:
        """Call something on the server's own event loop."""
        return anyio.from_thread.run_sync(function, token=self._token)

    def stop(self) -> None:
        """What SIGTERM does."""
        self.call(self.server.stop)

    def join(self, seconds: float = 10) -> int | None:
        """The exit code, once the server has ended."""
        self._thread.join(seconds)
        assert not self._thread.is_alive(), "the server does not end"
        return self.exit

    def close(self) -> None:
        """End the server whatever it is doing."""
        self.client.close()
        if self._thread.is_alive():
            self.stop()
        if self._thread.is_alive():
            self.stop()
        self.join()

    def chat(self, text: str = "hi", **body: Any) -> httpx.Response:
        """One chat completion."""
        return self.client.post("/v1/chat/completions", json=chat_body(text, **body))

    def raw(self) -> socket.socket:
        """A bare connection."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)

    def send_chat(self, text: str = "hi", **body: Any) -> socket.socket:
        """A bare connection over which a chat has been asked for."""
        content = json.dumps(chat_body(text, **body)).encode()
        connection = self.raw()
        kind = f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n{kind}"
        connection.sendall(head.encode() + content)
        return connection

    def metric(self, name: str, **labels: str) -> float:
        """The value of one of our metrics; 0 when it has not been counted yet."""
        page = self.client.get("/metrics").text
        inside = ",".join(f'{key}="{value}"' for key, value in sorted(labels.items()))
        start = f"thinkserve_{name}{{{inside}}} " if labels else f"thinkserve_{name} "
        return next((float(line[len(start) :]) for line in page.splitlines() if line.startswith(start)), 0.0)


def chat_body(text: str = "hi", **body: Any) -> dict[str, Any]:
    """A request's body."""
    return {"model": "m", "messages": [{"role": "user", "content": text}], **body}


def wait_until(condition: Callable[[], bool], seconds: float = 5.0) -> float:
    """Seconds until the condition held; fails when it does not in time."""
    started = monotonic()
    while not condition():
        assert monotonic() - started < seconds, "it never happened"
        sleep(0.002)
    return monotonic() - started


@pytest.fixture
def until() -> Callable[..., float]:
    """`wait_until` for tests."""
    return wait_until


@pytest.fixture
def serve() -> Iterator[Callable[..., Running]]:
    """Start servers; all of them are ended, and nothing may be live on their engines afterwards."""
    started: list[Running] = []

    def start(engine: ScriptedEngine, backend: ScriptedBackend | None = None, **settings: Any) -> Running:
        started.append(Running(engine, backend, **settings))
        return started[-1]

    yield start
    for server in started:
        server.close()
        assert server.engine.live == []
        assert server.backend.closed
