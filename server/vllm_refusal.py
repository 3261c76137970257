"""Why a worker refuses to serve a model: vLLM tells its parent only that it failed, so the worker leaves a note."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

# Every worker process inherits the environment, however it is started.
VARIABLE = "THINKSERVE_REFUSAL"


@contextmanager
def notes() -> Iterator[None]:
    """While engines start: there is a place for a note."""
    with TemporaryDirectory(prefix="thinkserve-") as folder:
        os.environ[VARIABLE] = str(Path(folder) / "note")
        try:
            yield
        finally:
            del os.environ[VARIABLE]


@contextmanager
def noted() -> Iterator[None]:
    """In the worker: a refusal, which is a ValueError of one line, is left as a note and raised on."""
    try:
        yield
    except ValueError as error:
        if place := os.environ.get(VARIABLE):
            Path(place).write_text(str(error), encoding="utf-8")
            # Its traceback says no more, and the line for the operator should not have to be looked for below it.
            logging.getLogger("vllm").setLevel(logging.CRITICAL + 1)
        raise


def note() -> str | None:
    """What a worker has left, in the process that starts it."""
    try:
        return Path(os.environ[VARIABLE]).read_text(encoding="utf-8")
    except (KeyError, FileNotFoundError):
        return None
