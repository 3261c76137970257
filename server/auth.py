"""API keys: every path needs one unless it is listed as public; without configured keys the server is open.

Admin keys open what ordinary keys open, and the routes that change the server; without admin keys nobody changes it.
Keys are compared as digests, all of them each time, so the time tells nothing. The path is the one that is routed
(`scope["path"]`), never a URL put together from headers. Each key has its own salt for the engine's prefix cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b, sha256
from pathlib import Path
from secrets import compare_digest
from typing import Any

from pydantic import SecretStr
from starlette.types import ASGIApp, Receive, Scope, Send

from thinkserve.server.asgi import header, refuse
from thinkserve.server.errors import ApiError
from thinkserve.server.metrics import Metrics
from thinkserve.server.model_dir import StartError
from thinkserve.server.settings import Settings


@dataclass(frozen=True, slots=True)
class Key:
    """What is kept of a key: its digest, a short public id for logs, and the salt of its cache."""

    digest: bytes
    id: str
    salt: str
    admin: bool = False


def make_key(secret: str, *, admin: bool = False) -> Key:
    """The key of a secret."""
    digest = sha256(secret.encode("utf-8", "surrogateescape")).digest()
    public = blake2b(digest, digest_size=6, person=b"ts-key-id").hexdigest()
    return Key(
        digest, public, blake2b(public.encode(), key=digest, digest_size=16, person=b"ts-salt").hexdigest(), admin
    )


def load_keys(settings: Settings) -> tuple[Key, ...]:
    """The keys of environment and files, admin keys last. Raises StartError when a file is unreadable or without keys.

    A key may not be an ordinary and an admin key at once.
    """
    plain = [make_key(secret) for secret in _secrets("api", settings.api_keys, settings.api_keys_file)]
    admin = [
        make_key(secret, admin=True) for secret in _secrets("admin", settings.admin_keys, settings.admin_keys_file)
    ]
    if {key.digest for key in plain} & {key.digest for key in admin}:
        raise StartError("An admin key is also an API key; whoever has it could change the server")
    return (*plain, *admin)


def _secrets(kind: str, given: SecretStr | None, file: Path | None) -> list[str]:
    secrets = given.get_secret_value().split(",") if given else []
    if file is not None:
        try:
            lines = file.read_text("utf-8").splitlines()
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or "not text"
            raise StartError(f"Cannot read {kind}_keys_file {file}: {reason}") from error
        secrets += [line for line in lines if not line.lstrip().startswith("#")]
    secrets = [secret.strip() for secret in secrets if secret.strip()]
    if not secrets and (given is not None or file is not None):
        # An empty setting must not open the server.
        message = f"{kind} keys are configured, but there is none in THINKSERVE_{kind.upper()}_KEYS or the key file"
        raise StartError(message)
    return secrets


def are_needed(keys: Sequence[Key]) -> bool:
    """Whether only those are let in who have a key: admin keys alone close nothing."""
    return any(not key.admin for key in keys)


class Auth:
    """ASGI middleware that lets in whoever has a key; without ordinary keys, everybody."""

    def __init__(self, app: ASGIApp, keys: tuple[Key, ...], public: tuple[str, ...], metrics: Metrics) -> None:
        self._app = app
        self._keys = keys
        self._closed = are_needed(keys)
        self._governed = any(key.admin for key in keys)
        self._public = frozenset(public)
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, with the key's id, salt and rank in the scope's state; else 401."""
        if scope["type"] == "http" and self._keys:
            scope["state"]["admin_keys"] = self._governed
            key = self._match(header(scope, b"authorization") or b"")
            if key is not None:
                scope["state"] |= {"key_id": key.id, "salt": key.salt, "admin": key.admin}
            elif self._closed and scope["path"] not in self._public:
                self._metrics.auth_failures.inc()
                await refuse(_refusal(), send)
                return
        await self._app(scope, receive, send)

    def _match(self, authorization: bytes) -> Key | None:
        scheme, _, secret = authorization.partition(b" ")
        digest = sha256(secret.strip() if scheme.lower() == b"bearer" else b"").digest()
        found = None
        for key in self._keys:
            found = key if compare_digest(key.digest, digest) else found
        return found


def require_admin(state: Mapping[str, Any]) -> None:
    """ApiError unless the request came with an admin key: 403 for an ordinary key and where there are no admin keys."""
    if state.get("admin"):
        return
    if state.get("admin_keys") and "key_id" not in state:
        raise _refusal("This route needs an admin key")
    what = "takes an admin key" if state.get("admin_keys") else "is closed: no admin key is configured"
    raise ApiError(403, "forbidden", f"This route {what}.", "permission_error")


def _refusal(need: str = "This server needs an API key") -> ApiError:
    message = f"{need}: send it as `Authorization: Bearer <key>`."
    return ApiError(401, "invalid_api_key", message, "authentication_error", None, {"WWW-Authenticate": "Bearer"})
