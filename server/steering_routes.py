"""The steering vectors over HTTP: read by whoever may use the server, changed by whoever has an admin key.

A body is the safetensors file itself (steering/vector_file.py); nothing in a request is ever a path.
"""

from __future__ import annotations

import logging
from typing import Any

from anyio import to_thread
from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from thinkserve.server.auth import require_admin
from thinkserve.server.errors import NO_RETRY, ApiError
from thinkserve.server.routes import UNCHANGED, state_of, tagged
from thinkserve.server.steered import foreign, invalid, unknown
from thinkserve.server.vector_types import VectorCard
from thinkserve.server.vectors import SteeringVector, VectorRegistry, check_name
from thinkserve.steering.vector_file import BadVector

logger = logging.getLogger("thinkserve")
router = APIRouter(generate_unique_id_function=lambda route: route.name, tags=["steering"])
KINDS = ("application/octet-stream", "application/vnd.safetensors")
CREATED: dict[int | str, dict[str, Any]] = {201: {"description": "There was no vector of that name."}}


@router.get("/v1/steering/vectors", summary="All steering vectors", responses=UNCHANGED)
async def list_vectors(request: Request) -> Response:
    """Cards of all vectors, by name; none where the engine cannot steer. Supports If-None-Match."""
    registry = state_of(request).backend.vectors
    cards = [] if registry is None else [card(vector, registry) for _, vector in sorted(registry.snapshot().items())]
    return tagged(request, {"object": "list", "data": cards})


@router.get("/v1/steering/vectors/{name}", summary="One steering vector", responses=UNCHANGED)
async def get_vector(request: Request, name: str) -> Response:
    """The card of one vector; supports If-None-Match."""
    registry = registry_of(request)
    return tagged(request, card(known(name, registry), registry))


@router.put("/v1/steering/vectors/{name}", summary="Add a steering vector or replace it", responses=CREATED)
async def put_vector(request: Request, name: str) -> Response:
    """Needs an admin key. Requests at work keep the version that they began with."""
    require_admin(request.scope["state"])
    registry = registry_of(request)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in KINDS or request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        message = f"The body must be a safetensors file, its Content-Type {KINDS[0]}, uncompressed."
        raise ApiError(415, "unsupported_media_type", message)
    raw, before = await request.body(), registry.snapshot()
    try:
        vector = await to_thread.run_sync(registry.put, name, raw)
    except BadVector as error:
        raise invalid(f"Not a usable steering vector: {error}.", None) from None
    except OSError as error:
        raise not_stored("written", error) from None
    logger.info("steering vector %s: version %d, id %s", vector.name, vector.version, vector.id)
    return JSONResponse(card(vector, registry), 200 if name in before else 201)


@router.delete("/v1/steering/vectors/{name}", summary="Delete a steering vector")
async def delete_vector(request: Request, name: str) -> Response:
    """Needs an admin key. Requests at work keep the vector."""
    require_admin(request.scope["state"])
    registry = registry_of(request)
    known(name, registry)
    try:
        await to_thread.run_sync(registry.delete, name)
    except OSError as error:
        raise not_stored("deleted", error) from None
    logger.info("steering vector %s: deleted", name)
    return JSONResponse({"id": name, "object": "steering_vector", "deleted": True})


def registry_of(request: Request) -> VectorRegistry:
    """The registry of the served model. ApiError 400 when the engine cannot steer."""
    registry = state_of(request).backend.vectors
    if registry is None:
        raise invalid("The engine of this server does not steer.", None)
    return registry


def known(name: str, registry: VectorRegistry) -> SteeringVector:
    """The vector of that name. ApiError 400 for what is no name, 404 vector_not_found for what is none of ours."""
    vectors = registry.snapshot()
    try:
        check_name(name)
        return vectors[name]
    except BadVector as error:
        raise invalid(f"Not a name: {error}.", "name") from None
    except KeyError:
        raise ApiError(404, "vector_not_found", unknown(name, vectors), param="name") from None


def card(vector: SteeringVector, registry: VectorRegistry) -> VectorCard:
    """What a client may know of a vector."""
    return {
        "id": vector.name,
        "object": "steering_vector",
        "version": vector.version,
        "content_id": vector.id,
        "hidden": vector.hidden,
        "layers": list(vector.layers),
        "norms": {str(layer): round(norm, 6) for layer, norm in vector.norms.items()},
        "convention": vector.convention,
        "recipe": vector.recipe,
        "model_fingerprint": vector.model_fingerprint or None,
        "made_for_this_model": None if not vector.model_fingerprint else not foreign(vector, registry),
        "about": dict(vector.about),
    }


def not_stored(done: str, error: OSError) -> ApiError:
    """The disk would not: the operator's log says why, the client does not see paths."""
    logger.error("a steering vector could not be %s: %s", done, error)
    return ApiError(507, "storage_failed", f"The vector could not be {done}.", "server_error", None, NO_RETRY)
