"""Server-sent events as OpenAI clients read them: `data:` lines and `:` comments, nothing else, `[DONE]` at the end.

No `event:`, `id:` or `retry:` line ever: the SDKs take each for a chunk. Several tasks may write; what is waiting while
one of them sends goes out together in the next send.
"""

from __future__ import annotations

import json
from time import monotonic

import anyio
from starlette.types import Send

DONE = b"data: [DONE]\n\n"
MARK = "\ue000text\ue001"
# Blocks that may wait for a slow client before writers are held up.
MOST_WAITING = 64

_encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


def data(payload: object) -> bytes:
    """A `data:` block. Raises ValueError for a number that JSON lacks."""
    return f"data: {_encode(payload)}\n\n".encode()


def comment(text: str) -> bytes:
    """A comment, which clients skip."""
    return f": {text}\n\n".encode()


class Template:
    """A block that differs from its like only in a text, encoded once: `payload` has MARK where the text goes."""

    def __init__(self, payload: object) -> None:
        self._parts = data(payload).decode().split(_encode(MARK))

    def fill(self, text: str) -> bytes:
        """The block with `text`."""
        return _encode(text).join(self._parts).encode()


class EventWriter:
    """Writes blocks to one client, in order. `last` is when something was last sent, on the monotonic clock.

    `lost`: a send has failed, which is how some servers report a client that has gone.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self._waiting: list[bytes] = []
        self._idle: anyio.Event | None = None
        self._since: float | None = None
        self.last = monotonic()
        self.lost = False

    @property
    def busy(self) -> bool:
        """Whether a send is under way."""
        return self._since is not None

    @property
    def stuck(self) -> float:
        """Seconds for which the client has not taken what is being sent."""
        return 0.0 if self._since is None else monotonic() - self._since

    async def write(self, block: bytes) -> None:
        """Send a block, or leave it to whoever is sending; returns late when too much waits."""
        self._waiting.append(block)
        if self._since is None:
            while self._waiting:
                await self._send_waiting()
        elif len(self._waiting) > MOST_WAITING:
            await self._until_idle()

    async def end(self) -> None:
        """Send what is left and `[DONE]`, and close the body."""
        while self.busy:
            await self._until_idle()
        self._waiting.append(DONE)
        await self._send_waiting(more=False)

    async def _send_waiting(self, more: bool = True) -> None:
        blocks, self._waiting = self._waiting, []
        self._since = monotonic()
        try:
            await self._send({"type": "http.response.body", "body": b"".join(blocks), "more_body": more})
        except BaseException as error:
            # A send that is cancelled while it waits for the client has not written yet.
            self._waiting[:0] = blocks
            self.lost = self.lost or isinstance(error, OSError)
            raise
        finally:
            self.last, self._since = monotonic(), None
            if self._idle is not None:
                self._idle.set()

    async def _until_idle(self) -> None:
        if self._idle is None or self._idle.is_set():
            self._idle = anyio.Event()
        await self._idle.wait()
