"""API keys: every path needs one unless it is listed as public; without configured keys the server is open.

Keys are compared as digests, all of them each time, so the time tells nothing. The path is the one that is routed
(`scope["path"]`), never a URL put together from headers. Each key has its own salt for the engine's prefix cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b, sha256
from secrets import compare_digest

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


def make_key(secret: str) -> Key:
    """The key of a secret."""
    digest = sha256(secret.encode("utf-8", "surrogateescape")).digest()
    public = blake2b(digest, digest_size=6, person=b"ts-key-id").hexdigest()
    return Key(digest, public, blake2b(public.encode(), key=digest, digest_size=16, person=b"ts-salt").hexdigest())


def load_keys(settings: Settings) -> tuple[Key, ...]:
    """The keys of environment and file. Raises StartError when the file cannot be read or holds no key."""
    secrets = settings.api_keys.get_secret_value().split(",") if settings.api_keys else []
    if settings.api_keys_file is not None:
        try:
            lines = settings.api_keys_file.read_text("utf-8").splitlines()
        except (OSError, UnicodeError) as error:
            raise StartError(f"The API key file {settings.api_keys_file} cannot be read: {error}") from error
        secrets += [line for line in lines if not line.lstrip().startswith("#")]
    keys = tuple(make_key(secret.strip()) for secret in secrets if secret.strip())
    if not keys and (settings.api_keys is not None or settings.api_keys_file is not None):
        # An empty setting must not open the server.
        raise StartError("API keys are configured, but there is none in THINKSERVE_API_KEYS or the key file")
    return keys


class Auth:
    """ASGI middleware that lets in whoever has a key."""

    def __init__(self, app: ASGIApp, keys: tuple[Key, ...], public: tuple[str, ...], metrics: Metrics) -> None:
        self._app = app
        self._keys = keys
        self._public = frozenset(public)
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, with the key's id and salt in the scope's state; else 401."""
        if scope["type"] == "http" and self._keys:
            key = self._match(header(scope, b"authorization") or b"")
            if key is not None:
                scope["state"] |= {"key_id": key.id, "salt": key.salt}
            elif scope["path"] not in self._public:
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


def _refusal() -> ApiError:
    message = "This server needs an API key: send it as `Authorization: Bearer <key>`."
    return ApiError(401, "invalid_api_key", message, "authentication_error", None, {"WWW-Authenticate": "Bearer"})
