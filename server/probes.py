"""Probes and metrics: cheap, never behind the admission, and none of them runs the model."""

from __future__ import annotations

from time import monotonic
from typing import cast

from anyio import sleep, to_thread
from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from thinkserve.server.metrics import Metrics
from thinkserve.server.state import ServerState

router = APIRouter(tags=["probes"], generate_unique_id_function=lambda route: route.name)


def state_of(request: Request) -> ServerState:
    """The server's state."""
    return cast("ServerState", request.app.state.server)


@router.get("/health", summary="As vLLM's: 200 while the engine lives, else 503")
async def health(request: Request) -> Response:
    """An empty body."""
    return Response(status_code=200 if state_of(request).backend.alive else 503)


@router.get("/livez", summary="Whether the process answers at all")
async def livez() -> Response:
    """Always 200: a stuck event loop gives no answer."""
    return JSONResponse({"status": "ok"})


@router.get("/readyz", summary="Whether new requests are taken")
async def readyz(request: Request) -> Response:
    """503 while draining or without the target's engine; `models` tells of every role."""
    state = state_of(request)
    alive, draining = state.backend.alive, state.admission.draining
    status = "draining" if draining else "ok" if alive else "engine_unavailable"
    models = {role: "ok" if model.alive else "unavailable" for role, model in state.backend.roles.items()}
    return JSONResponse({"status": status, "models": models}, 200 if status == "ok" else 503)


@router.get("/metrics", summary="Metrics of the server and of vLLM")
async def metrics(request: Request) -> Response:
    """Prometheus' text format."""
    page = await to_thread.run_sync(state_of(request).metrics.page)
    return Response(page, media_type="text/plain; version=0.0.4; charset=utf-8")


async def watch_lag(metrics: Metrics, every_s: float = 0.5) -> None:
    """Observe how late the event loop wakes up, for ever."""
    while True:
        due = monotonic() + every_s
        await sleep(every_s)
        metrics.loop_lag.observe(max(0.0, monotonic() - due))
