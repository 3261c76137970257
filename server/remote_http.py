"""HTTP to one remote model server: timeouts everywhere, bounded reads, retries before the first byte only, a breaker.

Only paths below the configured address are ever asked for: redirects are errors, the environment's proxies are not
used, TLS is verified. What the other side says in its errors is cut, cleaned and freed of our key before it is told.
"""

from __future__ import annotations

import json
import ssl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Literal

import anyio
import httpx

from thinkserve.server.errors import Refused, clean
from thinkserve.server.remote_breaker import Breaker
from thinkserve.server.settings import RemoteSettings
from thinkserve.strategies.errors import EngineDead, EngineFailed

# The server works, and will never do what this request asks for.
REFUSALS = frozenset({400, 413, 422, 501})
_OVERLOADED = frozenset({429, 503})
# No byte of an answer had come: asking again cannot make tokens appear twice.
_UNHEARD = (
    httpx.ConnectError, httpx.ConnectTimeout, httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError,
)  # fmt: skip
_ERROR_BYTES = 1 << 14
_ERROR_S = 5.0
_CLOSE_S = 2.0
_FIRST_WAIT_S = 0.1
# Below the five seconds after which vLLM closes an idle connection.
_IDLE_S = 4.0


@dataclass(frozen=True, slots=True)
class _Failure:
    """An attempt that came to nothing; `after` is the pause that the server asked for, `again` whether to retry."""

    error: EngineFailed
    cause: Exception | None = None
    again: bool = False
    after: float = 0.0


class RemoteHttp:
    """The connections to one server; `who` begins every message about it ("The remote guide")."""

    def __init__(self, base: str, settings: RemoteSettings, key: str | None, who: str) -> None:
        self.who = who
        self.settings = settings
        self.breaker = Breaker(settings.breaker_failures, settings.breaker_cooldown_s)
        self._key = key
        self._random = Random()
        self._closed = False
        self._client = httpx.AsyncClient(
            base_url=base,
            headers={"Accept-Encoding": "identity"} | ({} if key is None else {"Authorization": f"Bearer {key}"}),
            verify=_verifying(base, settings.ca_file),
            trust_env=False,
            follow_redirects=False,
            timeout=httpx.Timeout(
                connect=settings.connect_timeout_s,
                read=settings.read_timeout_s,
                write=settings.write_timeout_s,
                pool=settings.pool_timeout_s,
            ),
            limits=httpx.Limits(
                max_connections=settings.max_connections,
                max_keepalive_connections=settings.max_connections,
                keepalive_expiry=_IDLE_S,
            ),
        )

    @property
    def alive(self) -> bool:
        """Whether a call would go out now."""
        return not self._closed and not self.breaker.open

    async def aclose(self) -> None:
        """Close all connections; calls that come later raise EngineDead."""
        self._closed = True
        with anyio.move_on_after(_CLOSE_S, shield=True):
            await self._client.aclose()

    def shunned(self) -> EngineFailed:
        """The error of a call that is not made; EngineDead once the connections have been closed."""
        if self._closed:
            return EngineDead(f"{self.who} has been closed.")
        return EngineFailed(f"{self.who} has failed too often and is left alone for a while.")

    def broken(self, what: str) -> EngineFailed:
        """The error to raise for an answer that failed half-way; the breaker takes note."""
        self.breaker.failed()
        return EngineFailed(f"{self.who} {what}.")

    def refused(self, status: int, said: str) -> Refused:
        """The error to raise for a request that the server, which is well, will never serve."""
        self.breaker.succeeded()
        return Refused(f"{self.who} refuses the request ({status}){_after(self.told(said))}")

    def told(self, text: str) -> str:
        """Words of the other side, fit to be repeated."""
        return clean(text if self._key is None else text.replace(self._key, "***"), 200)

    async def post(self, path: str, body: object) -> dict[str, object]:
        """The JSON object that answers `body`. Raises Refused, EngineFailed, EngineDead.

        That the breaker may forget past failures is for who knows that the answer is of use: a server whose engine is
        stuck goes on counting tokens.
        """
        return await self._object("POST", path, body)

    async def get(self, path: str) -> dict[str, object]:
        """A JSON object. Raises as `post` does."""
        return await self._object("GET", path, None)

    async def _object(self, method: Literal["GET", "POST"], path: str, body: object) -> dict[str, object]:
        content = await self.read(await self.send(method, path, body))
        try:
            found = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise self.broken("answered something that is not JSON") from error
        if not isinstance(found, dict):
            raise self.broken("answered something that is not a JSON object")
        return found

    async def read(self, response: httpx.Response) -> bytes:
        """The whole body, within the limit; the response is closed."""
        body, limit = bytearray(), self.settings.max_body_bytes
        try:
            with self.reading():
                async for part in response.aiter_raw():
                    body += part
                    if len(body) > limit:
                        raise self.broken(f"sent more than {limit} bytes")
        finally:
            await shut(response)
        return bytes(body)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Turn what can go wrong while an answer is read into ours."""
        try:
            yield
        except httpx.TimeoutException as error:
            raise self.broken("has fallen silent in the middle of an answer") from error
        except (httpx.HTTPError, httpx.StreamError) as error:
            raise self.broken("broke off in the middle of an answer") from error

    async def send(self, method: Literal["GET", "POST"], path: str, body: object = None) -> httpx.Response:
        """A response of status 200 whose body is still to be read; the caller closes it. Raises as `post` does."""
        content = None if body is None else json.dumps(body, separators=(",", ":"), allow_nan=False).encode()
        attempt = 0
        while True:
            tried = await self._try(method, path, content)
            if isinstance(tried, httpx.Response):
                self.breaker.answered()
                return tried
            pause = self._pause(tried, attempt)
            if pause is None:
                self.breaker.failed()
                raise tried.error from tried.cause
            await anyio.sleep(pause)
            attempt += 1

    def _pause(self, failure: _Failure, attempt: int) -> float | None:
        """Seconds until the next attempt; None if there is none, or it would come after the request's deadline."""
        if not failure.again or attempt >= self.settings.retries:
            return None
        wait = _FIRST_WAIT_S * 2**attempt * self._random.uniform(0.5, 1.5)
        wait = max(failure.after + wait if failure.after else 0.0, wait)
        left = anyio.current_effective_deadline() - anyio.current_time()
        return wait if failure.after <= self.settings.longest_wait_s and wait < left else None

    async def _try(self, method: str, path: str, content: bytes | None) -> httpx.Response | _Failure:
        if self._closed or not self.breaker.admit():
            raise self.shunned()
        headers = {} if content is None else {"Content-Type": "application/json"}
        request = self._client.build_request(method, path, content=content, headers=headers)
        try:
            response = await self._client.send(request, stream=True)
        except httpx.PoolTimeout as error:
            raise EngineFailed(f"{self.who} has all of its connections in use.") from error
        except _UNHEARD as error:
            return _Failure(EngineFailed(f"{self.who} cannot be reached."), error, again=True)
        except httpx.TimeoutException as error:
            return _Failure(EngineFailed(f"{self.who} does not answer."), error)
        except httpx.HTTPError as error:
            return _Failure(EngineFailed(f"{self.who} does not speak HTTP as we do."), error)
        if response.status_code != 200:
            return await self._turned_away(response)
        if response.headers.get("content-encoding", "identity") != "identity":
            await shut(response)
            return _Failure(EngineFailed(f"{self.who} compresses its answers, which was not asked for."))
        return response

    async def _turned_away(self, response: httpx.Response) -> _Failure:
        """What a status other than 200 amounts to. Raises Refused when the request itself is refused."""
        status, said = response.status_code, await self._said(response)
        if status in REFUSALS:
            raise self.refused(status, said)
        if status in _OVERLOADED:
            error = EngineFailed(f"{self.who} is overloaded ({status}){_after(said)}")
            return _Failure(error, again=True, after=_seconds(response.headers.get("retry-after", "")))
        if response.is_redirect:
            return _Failure(EngineFailed(f"{self.who} redirects to somewhere else ({status}), which is not followed."))
        if status in (401, 403):
            return _Failure(EngineFailed(f"{self.who} does not accept our key ({status})."))
        return _Failure(EngineFailed(f"{self.who} answered {status}{_after(said)}"))

    async def _said(self, response: httpx.Response) -> str:
        """The message of an error's body, fit to be repeated."""
        body = bytearray()
        try:
            with anyio.move_on_after(_ERROR_S), suppress(httpx.HTTPError, httpx.StreamError):
                async for part in response.aiter_raw():
                    body += part
                    if len(body) > _ERROR_BYTES:
                        break
        finally:
            await shut(response)
        return self.told(error_message(bytes(body[:_ERROR_BYTES])))


def _verifying(base: str, ca_file: Path | None) -> ssl.SSLContext | bool:
    if not base.startswith("https:"):
        # Trusts nobody, and spares the time to load everybody.
        return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    return ssl.create_default_context(cafile=ca_file) if ca_file else True


async def shut(response: httpx.Response) -> None:
    """Close a response whatever happens; unless its body was read to the end, that closes the connection."""
    with anyio.move_on_after(_CLOSE_S, shield=True):
        await response.aclose()


def _after(said: str) -> str:
    """The end of a sentence that repeats what was said, if anything."""
    return f": {said}" if said else "."


def error_message(content: bytes) -> str:
    """The words in an error's body of OpenAI's shape, or of a shape close to it; nothing if there are none."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return ""
    for name in ("error", "message"):
        if isinstance(found, dict):
            found = found.get(name, found)
    return found if isinstance(found, str) else ""


def _seconds(retry_after: str) -> float:
    """The pause of a Retry-After header in seconds; its other form, a date, is left out: clocks differ."""
    return float(retry_after) if retry_after.isascii() and retry_after.isdigit() and len(retry_after) < 8 else 0.0
