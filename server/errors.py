"""Errors on the wire: one shape, OpenAI's, for every route and every cause.

ApiError carries data only; `from_exception` turns whatever the layers below raise into it. Text of a user is cleaned
before it is echoed; an unexpected exception yields a fixed sentence with the request id, never its own words.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.exceptions import HTTPException

from thinkserve.strategies.engine import Role
from thinkserve.strategies.errors import (
    BadOptions,
    EngineDead,
    EngineFailed,
    TooLong,
    Unforgiven,
    UnknownStrategy,
    Unsupported,
)

NO_RETRY = {"x-should-retry": "false"}


@dataclass(eq=False)
class ApiError(Exception):
    """An error as the client will see it. `param` is a dotted path into the body; `code` a stable string."""

    status: int
    code: str
    message: str
    type: str = "invalid_request_error"
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict[str, str])


def clean(text: str, limit: int = 80) -> str:
    """A user's text made safe to echo: at most `limit` characters, control characters and surrogates replaced."""
    cut = text[:limit] + ("..." if len(text) > limit else "")
    return "".join(c if c.isprintable() else "\ufffd" for c in cut)


def body(error: ApiError) -> dict[str, object]:
    """The JSON body of an error, in OpenAI's shape."""
    param = None if error.param is None else clean(error.param, 200)
    return {"error": {"message": clean(error.message, 2000), "type": error.type, "param": param, "code": error.code}}


def retry_after(low: int = 1, high: int = 5) -> dict[str, str]:
    """A `Retry-After` header with jitter, so that clients do not come back all at once."""
    return {"Retry-After": str(random.randint(low, high))}


class RoleDown(EngineFailed):
    """The model of one role is gone; what needs no other model than the target is still served."""

    def __init__(self, role: Role) -> None:
        super().__init__(f"The model that serves the role {role!r} is not available.")
        self.role = role


class RoleFailed(EngineFailed):
    """The model of one role other than the target gave up on what it was asked; why is for the operator (the log)."""

    def __init__(self, role: Role) -> None:
        super().__init__(f"The model that serves the role {role!r} could not do its part.")
        self.role = role


class Refused(Unsupported):
    """A model on another server refuses what it was asked, in that server's words: not for those who use this one."""


def from_exception(exc: BaseException, request_id: str) -> ApiError:
    """What the client is told about `exc`; of a group, the mildest member that has a translation."""
    known = [error for leaf in leaves(exc) if (error := _translate(leaf, request_id)) is not None]
    if known:
        return min(known, key=lambda error: error.status)
    return ApiError(500, "internal_error", f"Internal error; request id {request_id}.", "server_error", None, NO_RETRY)


def draining(headers: Mapping[str, str]) -> ApiError:
    """The server ends; `headers` say whether to ask again."""
    return ApiError(503, "draining", "The server is shutting down.", "overloaded_error", None, headers)


def leaves(exc: BaseException) -> Iterator[BaseException]:
    """The errors in a group, however deep; any other error is its own."""
    if isinstance(exc, BaseExceptionGroup):
        for member in exc.exceptions:
            yield from leaves(member)
    else:
        yield exc


def _translate(exc: BaseException, request_id: str) -> ApiError | None:
    return next((build(exc, request_id) for kind, build in TABLE if isinstance(exc, kind)), None)


def _bad_options(exc: BadOptions) -> ApiError:
    param = f"strategy.params.{exc.param}" if exc.param else "strategy.params"
    return ApiError(400, "value_out_of_range", str(exc), param=param)


def _unsupported(exc: Unsupported) -> ApiError:
    code = "strategy_unavailable" if exc.param == "strategy" else "unsupported_parameter"
    return ApiError(400, code, str(exc), param=exc.param)


def _engine_dead() -> ApiError:
    message = "The engine is not available; the server is restarting or needs its operator."
    return ApiError(503, "engine_unavailable", message, "overloaded_error", None, retry_after(5, 30))


def _role_down(exc: RoleDown) -> ApiError:
    code = "prm_unavailable" if exc.role == "reward" else "engine_unavailable"
    return ApiError(503, code, str(exc), "overloaded_error", None, retry_after(5, 30))


def _role_failed(exc: RoleFailed, request_id: str) -> ApiError:
    code = "prm_unavailable" if exc.role == "reward" else f"{exc.role}_failed"
    message = f"{str(exc).removesuffix('.')}; request id {request_id}."
    return ApiError(502, code, message, "api_error", None, NO_RETRY)


def _engine_failed(request_id: str) -> ApiError:
    message = f"The engine could not finish this request; request id {request_id}."
    return ApiError(500, "internal_error", message, "server_error", None, NO_RETRY)


def _deadline() -> ApiError:
    message = "The deadline passed before there was a usable answer."
    return ApiError(504, "deadline_exceeded", message, "timeout_error", None, NO_RETRY)


def _from_http(exc: HTTPException) -> ApiError:
    status, headers = exc.status_code, dict(exc.headers or {})
    if status >= 500:
        return ApiError(status, "internal_error", "Internal error.", "server_error", None, {**headers, **NO_RETRY})
    code, message = {
        404: ("route_not_found", "No such route."),
        405: ("method_not_allowed", "This route does not take that method."),
    }.get(status, ("invalid_request", "The request could not be read."))
    return ApiError(status, code, message, headers=headers)


# First match wins, so subclasses stand before their bases.
TABLE: tuple[tuple[type[BaseException], Callable[[Any, str], ApiError]], ...] = (
    (ApiError, lambda exc, _: exc),
    (BadOptions, lambda exc, _: _bad_options(exc)),
    (UnknownStrategy, lambda exc, _: ApiError(400, "unknown_strategy", str(exc), param="strategy")),
    (Unsupported, lambda exc, _: _unsupported(exc)),
    (TooLong, lambda exc, _: ApiError(400, "context_length_exceeded", str(exc), param="messages")),
    (Unforgiven, lambda exc, request_id: from_exception(exc.failure, request_id)),
    (RoleDown, lambda exc, _: _role_down(exc)),
    (RoleFailed, _role_failed),
    (EngineDead, lambda *_: _engine_dead()),
    (EngineFailed, lambda _, request_id: _engine_failed(request_id)),
    (TimeoutError, lambda *_: _deadline()),
    (HTTPException, lambda exc, _: _from_http(exc)),
)
