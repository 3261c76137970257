"""The routes that speak to API clients; each handler parses, asks one module, and answers.

Probes, metrics and the exception handlers are the app's.
"""

from __future__ import annotations

from dataclasses import replace
from time import monotonic
from typing import Any, cast

from anyio import fail_after
from anyio.lowlevel import checkpoint_if_cancelled
from fastapi import APIRouter, Request
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response

from thinkserve.server import __version__, discovery, wire_out
from thinkserve.server.asgi import error_message
from thinkserve.server.errors import ApiError, from_exception
from thinkserve.server.exchange import Exchange
from thinkserve.server.json_body import read_json
from thinkserve.server.plan import Plan
from thinkserve.server.protocol import ChatRequest, parse_chat
from thinkserve.server.responses import ChatJson, ChatStream
from thinkserve.server.state import ServerState
from thinkserve.server.translate import Warnings, to_plan, to_timeout

router = APIRouter(generate_unique_id_function=lambda route: route.name)
UNCHANGED: dict[int | str, dict[str, Any]] = {304: {"description": "The client has this document already."}}


def state_of(request: Request) -> ServerState:
    """The server's state, put into the app at start-up."""
    return cast("ServerState", request.app.state.server)


@router.post("/v1/chat/completions", tags=["chat"], summary="Answer a chat with a strategy of the caller's choice")
async def chat_completions(request: Request) -> Response:
    """Plain or streamed; the strategy is chosen by `strategy`, header, model suffix or effort."""
    state, scope = state_of(request), request.scope["state"]
    chat = parse_chat(await read_json(request))
    try:
        plan = await prepare(request, chat, state)
    except TimeoutError as error:
        # Answered here and not by the app, which counts what never got to work.
        return refusal(from_exception(error, scope["request_id"]))
    response = ChatStream(plan, chat, state) if chat.stream else ChatJson(plan, chat, state)
    response.headers.update(wire_out.headers(plan, chat))
    return response


async def prepare(request: Request, chat: ChatRequest, state: ServerState) -> Plan:
    """The plan of a chat, with what is left of its deadline: many prompts may be waiting to be rendered.

    Raises what `to_plan` raises. Counts and raises TimeoutError, and ClientDisconnect when the client has left.
    """
    started, scope, exchange = monotonic(), request.scope["state"], Exchange(request.receive)
    timeout_s = to_timeout(chat, request.headers, state.settings, Warnings())
    made: list[Plan | Exception] = []

    async def work() -> None:
        try:
            with fail_after(timeout_s):
                plan = await to_plan(chat, request.headers, state, scope["request_id"], scope.get("salt"))
                # Rendering that has begun is not cut short: whether it was too late is found here.
                await checkpoint_if_cancelled()
            made.append(plan)
        except Exception as error:  # noqa: BLE001 - raised below, outside of the task group
            made.append(error)

    await exchange.run(work)
    seconds = monotonic() - started
    if exchange.gone is not None:
        state.metrics.disconnected("waiting", monotonic() - exchange.gone)
        state.metrics.request("none", "aborted", seconds)
        raise ClientDisconnect
    (plan,) = made
    if isinstance(plan, TimeoutError):
        state.metrics.request("none", "deadline", seconds)
    if isinstance(plan, Exception):
        raise plan
    return replace(plan, timeout_s=max(timeout_s - seconds, 0.0))


@router.get("/v1/models", tags=["discovery"], summary="The model and its presets")
async def list_models(request: Request) -> Response:
    """Every preset is a card of its own, so that model pickers offer it."""
    state = state_of(request)
    return JSONResponse(discovery.models(state, int(state.started)))


@router.get("/v1/models/{name:path}", tags=["discovery"], summary="One model or preset")
async def get_model(request: Request, name: str) -> Response:
    """The card of one model."""
    state = state_of(request)
    return JSONResponse(discovery.model(state, int(state.started), name))


@router.get("/v1/strategies", tags=["discovery"], summary="All strategies and their parameters", responses=UNCHANGED)
async def list_strategies(request: Request) -> Response:
    """Cards of all strategies; supports If-None-Match."""
    return tagged(request, discovery.strategies(state_of(request)))


@router.get("/v1/strategies/{name}", tags=["discovery"], summary="One strategy", responses=UNCHANGED)
async def get_strategy(request: Request, name: str) -> Response:
    """The card of one strategy, by id or alias; supports If-None-Match."""
    return tagged(request, discovery.strategy(state_of(request), name))


@router.get("/version", tags=["server"], summary="The server's version")
async def version() -> Response:
    """The version of this package."""
    return JSONResponse({"version": __version__})


def refusal(error: ApiError) -> Response:
    """An error as a response."""
    content, headers = error_message(error)
    response = Response(content, error.status)
    response.raw_headers = headers
    return response


def tagged(request: Request, document: object) -> Response:
    """The document with its ETag, or 304 when the client has it already."""
    tag = discovery.etag(document)
    known = {each.strip().removeprefix("W/") for each in request.headers.get("if-none-match", "").split(",")}
    if known & {tag, "*"}:
        return Response(status_code=304, headers={"ETag": tag})
    return JSONResponse(document, headers={"ETag": tag})
