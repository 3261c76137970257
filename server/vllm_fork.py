"""Forking several engines at the same time, none of which outlives the server."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ctypes import CDLL
from threading import Event, Lock, Thread, get_ident

_PR_SET_PDEATHSIG = 1


@contextmanager
def children_die_with_us() -> Iterator[None]:
    """Processes forked within are killed by Linux when this thread ends: vLLM's core would outlive a killed server."""
    armed = True
    prctl = CDLL(None).prctl

    def in_child() -> None:
        if armed:
            prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    os.register_at_fork(after_in_child=in_child)
    try:
        yield
    finally:
        armed = False


def run_together(calls: Sequence[Callable[[], None]]) -> None:
    """Call functions that each fork a process, and wait for all of them; they must not raise.

    Each runs in a thread that stays for good: Linux kills the forked process when the thread that forked it ends.
    """
    turns = _Turns()

    def run(call: Callable[[], None], over: Event) -> None:
        turns.begin()
        try:
            call()
        finally:
            turns.end()
            over.set()
        Event().wait()

    ends = [Event() for _ in calls]
    for call, over in zip(calls, ends, strict=True):
        Thread(target=run, args=(call, over), daemon=True, name="engine").start()
    for over in ends:
        over.wait()


class _Turns:
    """Threads fork one after the other: none may hold a lock on its way there that the child of another inherits."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._thread: int | None = None
        os.register_at_fork(after_in_parent=self.end)

    def begin(self) -> None:
        """Wait until no other thread is about to fork."""
        self._lock.acquire()
        self._thread = get_ident()

    def end(self) -> None:
        """This thread has forked, or will not."""
        if self._thread == get_ident():
            self._thread = None
            self._lock.release()
