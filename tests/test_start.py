"""`thinkserve serve` as an operator meets it: a command on the real engine, asked a question, stopped by a signal."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from threading import Timer

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
PATIENCE_S = 240


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """The process and the lines it has written until it was ready."""
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-m", "thinkserve.server", "serve", "--port", "0", "--kv-cache-gib", "0.1"]
    process = subprocess.Popen(
        command, cwd="/", env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    watchdog = Timer(PATIENCE_S, process.kill)
    watchdog.start()
    lines: list[str] = []
    try:
        for line in process.stderr or ():
            lines.append(line)
            if line.startswith("curl "):
                break
        yield process, lines
    finally:
        watchdog.cancel()
        process.kill()
        process.communicate()


def test_the_line_to_copy_gets_an_answer(server: tuple[subprocess.Popen[str], list[str]]) -> None:
    """The last line printed is a question that the server answers, with a count of what it cost."""
    _, lines = server
    words = shlex.split(lines[-1])
    request = urllib.request.Request(words[2], words[-1].encode(), {"Content-Type": "application/json"})  # noqa: S310
    with urllib.request.urlopen(request, timeout=PATIENCE_S) as response:  # noqa: S310 - the address is our own
        answer = json.load(response)

    assert re.search(r"is ready after [\d.]+ s: http://127\.0\.0\.1:\d+$", lines[-2].strip())
    assert "assistant" == answer["choices"][0]["message"]["role"]
    assert answer["usage"]["completion_tokens"] > 0


def test_a_signal_ends_it_in_good_order(server: tuple[subprocess.Popen[str], list[str]]) -> None:
    """SIGTERM: exit status 0, and no process of it is left."""
    process, _ = server
    process.send_signal(signal.SIGTERM)

    assert 0 == process.wait(PATIENCE_S)
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_a_model_that_is_damaged_is_told_in_one_line(tmp_path: Path) -> None:
    """What only the engine can find out is one line too, and exit status 2."""
    embedded = Path(__file__).resolve().parents[1] / "models" / "arith-small"
    for file in embedded.iterdir():
        if file.is_file() and file.name != "config.json":
            (tmp_path / file.name).symlink_to(file)
    shape = json.loads((embedded / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**shape, "architectures": ["NoSuchModel"]}))
    command = [sys.executable, "-m", "thinkserve.server", "serve", str(tmp_path), "--port", "0"]
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        command, cwd="/", env=environment, check=False, capture_output=True, text=True, timeout=PATIENCE_S
    )

    assert 2 == done.returncode
    assert "thinkserve: vLLM does not know the architecture NoSuchModel" == done.stderr.strip().splitlines()[-1]
