"""From bind to exit: a taken port is told at once, SIGTERM drains, a second one cuts off, a dead engine ends it all."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from time import monotonic, sleep
from typing import Any

import anyio
import pytest

from thinkserve.server.lifecycle import reserve_socket
from thinkserve.server.model_dir import StartError
from thinkserve.strategies.testing import ScriptedEngine

Serve = Callable[..., Any]
Until = Callable[..., float]


def test_a_taken_port_is_told_in_one_line() -> None:
    """Before anything is loaded."""
    with reserve_socket("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(StartError, match=f"Cannot listen on 127.0.0.1:{port}: "):
            reserve_socket("127.0.0.1", port)
    reserve_socket("127.0.0.1", port).close()


def test_an_address_that_is_not_ours_is_told_as_well() -> None:
    """Neither a foreign address nor a name is bound."""
    for host in ("203.0.113.1", "no-such-host.invalid"):
        with pytest.raises(StartError, match="Cannot listen"):
            reserve_socket(host, 0)


def test_draining_finishes_what_runs_and_takes_nothing_new(serve: Serve, until: Until) -> None:
    """readyz turns at once, new work is 503 `draining`, what runs is answered in full, then the exit code is 0."""
    server = serve(ScriptedEngine(["t" * 60 + "</think>done"], tick=0.01))
    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(server.chat, stream=stream) for stream in (False, True)]
        until(lambda: len(server.engine.live) == 2)
        server.stop()
        assert server.client.get("/readyz").status_code == 503
        assert server.client.get("/livez").status_code == 200
        refused = server.chat()
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert refused.headers["connection"] == "close"
        answers = [each.result() for each in running]
    assert answers[0].json()["choices"][0]["message"]["content"] == "done"
    assert answers[1].text.endswith("data: [DONE]\n\n")
    assert server.join() == 0
    assert server.backend.closed


def test_after_the_drain_time_strategies_decide_with_what_they_have(serve: Serve, until: Until) -> None:
    """A finished chain wins over one that would go on for ever."""
    scripts = ["t</think>\\boxed{7}", "t" * 20_000]
    server = serve(ScriptedEngine(scripts, tick=0.005), drain_timeout_s=0.3)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(server.chat, strategy={"name": "majority", "params": {"k": 2}})
        until(lambda: server.engine.generated > 40)
        server.stop()
        answer = running.result().json()
    assert answer["choices"][0]["message"]["content"] == "\\boxed{7}"
    assert answer["strategy"]["stopped_by"] == "deadline"
    assert server.join() == 0


@pytest.mark.parametrize("stream", [False, True])
def test_who_has_no_answer_after_the_drain_time_may_ask_another_server(
    serve: Serve, until: Until, stream: bool
) -> None:
    """It is not the client's deadline."""
    server = serve(ScriptedEngine(["t" * 20_000], tick=0.005), drain_timeout_s=0.2)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(server.chat, stream=stream, include_reasoning=False)
        until(lambda: server.engine.generated > 10)
        server.stop()
        answer = running.result()
    assert '"code":"draining"' in answer.text.replace('": "', '":"')
    if not stream:
        assert (503, True) == (answer.status_code, "retry-after" in answer.headers)
    assert server.join() == 0


def test_a_second_signal_cuts_off_with_an_error_event(serve: Serve, until: Until) -> None:
    """Streams end with an error and `[DONE]`, plain requests with 503, soon."""
    server = serve(ScriptedEngine(["t" * 20_000], tick=0.005))
    with ThreadPoolExecutor(2) as pool:
        streamed, plain = pool.submit(server.chat, stream=True), pool.submit(server.chat)
        until(lambda: len(server.engine.live) == 2)
        started = monotonic()
        server.stop()
        sleep(0.1)
        assert len(server.engine.live) == 2
        server.stop()
        assert '"code":"draining"' in streamed.result().text
        assert streamed.result().text.endswith("data: [DONE]\n\n")
        assert (plain.result().status_code, plain.result().headers["x-should-retry"]) == (503, "false")
    assert server.join() == 0
    assert monotonic() - started < 4


def test_a_second_signal_does_not_wait_for_requests_that_are_not_at_work_yet(serve: Serve, until: Until) -> None:
    """They wait to be rendered, and are told the same once they are."""
    server = serve(ScriptedEngine(["t" * 20_000], tick=0.005))
    rendering, go_on = threading.Event(), threading.Event()
    plain = server.backend.render

    async def slow(*args: Any, **more: Any) -> Any:
        rendering.set()
        await anyio.to_thread.run_sync(go_on.wait)
        return await plain(*args, **more)

    server.backend.render = slow
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(server.chat)
        assert rendering.wait(5)
        server.stop()
        server.stop()
        go_on.set()
        assert "draining" == waiting.result().json()["error"]["code"]
    started = monotonic()
    assert server.join() == 0
    assert monotonic() - started < 4
    assert 0 == server.engine.generated


def test_a_dead_engine_ends_the_server_with_an_error_code(serve: Serve) -> None:
    """An orchestrator starts it anew."""
    server = serve(ScriptedEngine(["t"]))
    server.backend.alive = False
    assert server.client.get("/health").status_code == 503
    assert server.join() == 1


PROGRAM = """
import sys, anyio
from thinkserve.server.lifecycle import Server, reserve_socket
from thinkserve.server.settings import Settings
from thinkserve.server.testing import ScriptedBackend
from thinkserve.strategies.testing import ScriptedEngine
listener = reserve_socket("127.0.0.1", 0)
async def main():
    backend = ScriptedBackend(ScriptedEngine(["t" * 100 + "</think>a"], tick=0.01))
    server = Server(Settings(served_name="m"), backend, listener)
    return await server.run(lambda: print(listener.getsockname()[1], flush=True))
sys.exit(anyio.run(main))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_real_signal_drains_a_real_process(number: signal.Signals) -> None:
    """The stream under way is finished, the exit code is 0."""
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            port = int(process.stdout.readline())
            with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
                content = b'{"model": "m", "stream": true, "messages": [{"role": "user", "content": "x"}]}'
                head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n"
                connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + content)
                data = connection.recv(100)
                os.kill(process.pid, number)
                while b"[DONE]" not in data and (part := connection.recv(65536)):
                    data += part
            assert b"[DONE]" in data
            assert process.wait(15) == 0
        finally:
            process.kill()
