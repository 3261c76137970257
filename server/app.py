"""The FastAPI app: routes, middlewares, and one error shape for whatever goes wrong."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.responses import Response

from thinkserve.server import __version__, openapi, probes, routes, steering_routes
from thinkserve.server.admission import Admission
from thinkserve.server.auth import Auth, are_needed, load_keys
from thinkserve.server.errors import ApiError, from_exception
from thinkserve.server.json_body import read_body
from thinkserve.server.middleware import BodyLimit, Guard, RequestContext, answered_hosts
from thinkserve.server.plan import Backend
from thinkserve.server.settings import Settings
from thinkserve.server.state import ServerState, new_state
from thinkserve.strategies.errors import ReasoningError


def create_app(settings: Settings, backend: Backend) -> FastAPI:
    """The app over a running backend, which it closes when it shuts down. Raises StartError for unusable API keys."""
    state = new_state(settings, backend)
    app = FastAPI(
        title="thinkserve",
        version=__version__,
        lifespan=_lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        middleware=_middlewares(state),
    )
    app.state.server = state
    app.include_router(routes.router, dependencies=[Depends(_place)])
    app.include_router(steering_routes.router)
    app.include_router(probes.router)
    for kind in (ApiError, ReasoningError, TimeoutError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, _answer)
    app.openapi = lambda: _document(app)  # type: ignore[method-assign]
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    yield
    await app.state.server.backend.aclose()


def _middlewares(state: ServerState) -> list[Middleware]:
    settings, keys = state.settings, load_keys(state.settings)
    return [
        Middleware(RequestContext),
        Middleware(Guard, answered_hosts(settings, are_needed(keys))),
        Middleware(Auth, keys, settings.public_routes, state.metrics),
        Middleware(BodyLimit, settings.max_body_bytes),
    ]


async def _place(request: Request) -> AsyncIterator[None]:
    """A chat's place from when its body is there until it is answered: to wait for rendering takes room as well."""
    if request.method != "POST":
        yield
        return
    admission: Admission = request.app.state.server.admission
    admission.check()
    # Whoever has not said what it wants keeps nobody out.
    await read_body(request)
    with admission.place():
        yield


async def _answer(request: Request, error: Exception) -> Response:
    state: ServerState = request.app.state.server
    if isinstance(error, RequestValidationError):
        error = ApiError(400, "invalid_request", "The request could not be read.")
    told = from_exception(error, request.scope["state"]["request_id"])
    if request.method == "POST":
        state.metrics.refused(told.status, told.code)
    return routes.refusal(told)


def _document(app: FastAPI) -> dict[str, Any]:
    if app.openapi_schema is None:
        app.openapi_schema = openapi.document(app)
    return app.openapi_schema
