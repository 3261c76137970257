"""Starting and ending a server under test, with a small script in the server's place."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import anyio
import pytest

from bench.client import BadReply, get
from bench.servers import Launch, NotStarted, running

pytestmark = pytest.mark.anyio

# Answers /v1/models and every POST; a child process of it would outlive a plain terminate.
SCRIPT = """
import http.server, json, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print("child", child.pid, flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def reply(self, body):
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def do_GET(self):
        self.reply(json.dumps({"data": [{"id": "scripted"}]}).encode())
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_error(418) if "refuse" in sys.argv else self.reply(b"{}")
http.server.HTTPServer(("127.0.0.1", int(sys.argv[-1])), Handler).serve_forever()
"""


async def test_a_server_is_up_inside_the_block_and_gone_after_it(tmp_path: Path) -> None:
    """The model's name is found out, and nothing the server started survives the block."""
    log = tmp_path / "server.log"

    async with running(Launch("scripted", (sys.executable, "-c", SCRIPT)), log) as server:
        reply = await get(server.address, "/v1/models")
        child = int(log.read_text().split()[1])
    with anyio.fail_after(5):
        while alive(child):
            await anyio.sleep(0.02)

    assert ("scripted", 200) == (server.model, reply.status)
    assert server.first_answer_s > 0
    with pytest.raises((OSError, BadReply)):
        await get(server.address, "/v1/models")


async def test_a_server_that_ends_at_once_shows_its_last_words(tmp_path: Path) -> None:
    """No waiting for a dead process: the error holds its status and the end of its log."""
    launch = Launch("dead", (sys.executable, "-c", "print('no such model'); raise SystemExit(2)"))

    with pytest.raises(NotStarted, match=r"(?s)exit status 2.*no such model"):
        async with running(launch, tmp_path / "server.log"):
            pass


async def test_a_server_that_refuses_chats_is_not_waited_for(tmp_path: Path) -> None:
    """An answer that asking again will not change ends the start at once, with its status."""
    with pytest.raises(NotStarted, match="answered 418"):
        async with running(Launch("scripted", (sys.executable, "-c", SCRIPT, "refuse")), tmp_path / "server.log"):
            pass


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
