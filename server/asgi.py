"""Small things that middlewares share: reading a header, answering with an error."""

from __future__ import annotations

import json

from starlette.types import Scope, Send

from thinkserve.server.errors import ApiError, body


def header(scope: Scope, name: bytes) -> bytes | None:
    """The first header of that (lower-case) name."""
    headers: list[tuple[bytes, bytes]] = scope["headers"]
    return next((value for key, value in headers if key == name), None)


def error_message(error: ApiError) -> tuple[bytes, list[tuple[bytes, bytes]]]:
    """Body and headers of an error."""
    content = json.dumps(body(error), allow_nan=False).encode()
    headers = {"Content-Type": "application/json", "Content-Length": str(len(content)), **error.headers}
    return content, [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]


async def refuse(error: ApiError, send: Send) -> None:
    """Answer with an error."""
    content, headers = error_message(error)
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": content})
