"""A helper process that answers lines and can be killed: the blocking half of equivalence.py, for use from a thread."""

from __future__ import annotations

import json
import math
import os
import select
import subprocess
import sys
import time
from contextlib import suppress
from threading import Lock
from typing import Any

COMMAND = (sys.executable, "-P", "-m", "thinkserve.strategies.math_worker")
START_LIMIT_S = 60.0


class Worker:
    """Starts when first asked, stays warm, is killed when late. Safe to use from several threads and event loops."""

    def __init__(self, command: tuple[str, ...] = COMMAND, start_limit: float = START_LIMIT_S) -> None:
        self._command = command
        self._start_limit = start_limit
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = Lock()

    @property
    def pid(self) -> int | None:
        """Process id while it runs."""
        return self._process.pid if self._process else None

    def start(self) -> bool:
        """Make sure that the process runs and is ready; false when it does not come up in time."""
        with self._lock:
            return self._ready()

    def ask(self, question: Any, time_limit: float, until: float = math.inf) -> bool | None:
        """The process's answer; None, and the process is killed, when it takes longer (seconds) or dies.

        Nobody waits for it after `until` (on the monotonic clock): None as well, and what has not been asked never is.
        """
        with self._lock:
            if time.monotonic() >= until or not self._ready():
                return None
            left = min(time_limit, until - time.monotonic())
            return self._exchange(question, left) if left > 0 else None

    def stop(self) -> None:
        """Kill the process, if there is one, and reap it; whoever waits for its answer gets None."""
        process = self._process
        if process is not None:
            process.kill()
        with self._lock:
            self._discard()

    def _ready(self) -> bool:
        if self._process is not None and self._process.poll() is not None:
            self._discard()
        if self._process is None:
            # A session of its own: an interrupt from the terminal is the server's business.
            self._process = subprocess.Popen(  # noqa: S603  # our own interpreter and module
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            if self._line(self._start_limit) != "ready":
                self._discard()
                return False
        return True

    def _exchange(self, question: Any, time_limit: float) -> bool | None:
        try:
            self._send(question)
            answer = self._line(time_limit)
        except OSError:
            answer = None
        if answer is None:
            self._discard()
        return answer if isinstance(answer, bool) else None

    def _send(self, question: Any) -> None:
        if self._process is None or self._process.stdin is None:
            raise BrokenPipeError
        self._process.stdin.write(json.dumps(question).encode() + b"\n")
        self._process.stdin.flush()

    def _line(self, time_limit: float) -> Any:
        """The next line's value; None when it is late or the process has ended."""
        if self._process is None or self._process.stdout is None:
            return None
        descriptor = self._process.stdout.fileno()
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        deadline = time.monotonic() + time_limit
        line = b""
        while not line.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not poll.poll(left * 1000):
                return None
            chunk = os.read(descriptor, 4096)
            if not chunk:
                return None
            line += chunk
        return json.loads(line)

    def _discard(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()
