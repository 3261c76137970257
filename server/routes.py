"""The routes that speak to API clients; each handler parses, asks one module, and answers.

Probes, metrics and the exception handlers are the app's.
"""

from __future__ import annotations

from typing import Any, cast

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from thinkserve.server import __version__, discovery, wire_out
from thinkserve.server.json_body import read_json
from thinkserve.server.protocol import parse_chat
from thinkserve.server.responses import ChatJson, ChatStream
from thinkserve.server.state import ServerState
from thinkserve.server.translate import to_plan

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
    plan = await to_plan(chat, request.headers, state, scope["request_id"], scope.get("salt"))
    response = ChatStream(plan, chat, state) if chat.stream else ChatJson(plan, chat, state)
    response.headers.update(wire_out.headers(plan, chat))
    return response


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


def tagged(request: Request, document: object) -> Response:
    """The document with its ETag, or 304 when the client has it already."""
    tag = discovery.etag(document)
    known = {each.strip().removeprefix("W/") for each in request.headers.get("if-none-match", "").split(",")}
    if known & {tag, "*"}:
        return Response(status_code=304, headers={"ETag": tag})
    return JSONResponse(document, headers={"ETag": tag})
