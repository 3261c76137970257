"""The OpenAPI document of the app: FastAPI's list of routes, with the bodies that handlers read and write by hand.

The request's `strategy` is a union with one branch per registered strategy, so that clients generated from the document
know every parameter. The document depends on the code and the registry only, never on a configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import TypeAdapter

from thinkserve.server import __version__, vector_types, wire_types
from thinkserve.server.protocol import REFUSED, ChatRequest, StrategyChoice
from thinkserve.strategies import registry
from thinkserve.strategies.registry import Strategy

Schema = dict[str, Any]
COMPONENTS = "#/components/schemas/"
DESCRIPTION = (
    "OpenAI-compatible chat with a reasoning strategy per request. Fields that are not listed are ignored and named in"
    " X-Ignored-Params; these are refused unless they have their neutral value: "
)
STREAM = "With `stream`: `data:` lines, each a chunk or an error, comments in between, at the end `data: [DONE]`."

# Path -> the shape of its answer; other routes speak for themselves.
ANSWERS: dict[str, type] = {
    "/v1/chat/completions": wire_types.Completion,
    "/v1/models": wire_types.ModelList,
    "/v1/models/{name}": wire_types.ModelCard,
    "/v1/strategies": wire_types.StrategyList,
    "/v1/strategies/{name}": wire_types.StrategyCard,
    "/v1/steering/vectors": vector_types.VectorList,
    "/v1/steering/vectors/{name}": vector_types.VectorCard,
    "/version": wire_types.Version,
}
HEADERS = {
    "X-Reasoning-Strategy": "The strategy at work with its effective parameters, as an RFC 8941 item.",
    "X-Ignored-Params": "Fields of the request that were not understood.",
    "Server-Timing": "Milliseconds to the first token and to the decision; not of streams.",
}


def document(app: FastAPI) -> Schema:
    """The OpenAPI 3.1 document, plain JSON types only."""
    paths: Schema = get_openapi(title="thinkserve", version=__version__, routes=app.routes)["paths"]
    schemas: Schema = {}
    for path, operations in paths.items():
        for operation in operations.values():
            _complete(operation, ANSWERS.get(path), schemas)
    chat = paths["/v1/chat/completions"]["post"]
    chat["requestBody"] = {"required": True, "content": _json(_request(schemas))}
    chat["parameters"] = [_parameter(name, text) for name, text in REQUEST_HEADERS.items()]
    _vectors(paths["/v1/steering/vectors/{name}"], schemas)
    done = chat["responses"]["200"]
    done["description"] = STREAM
    done["content"]["text/event-stream"] = {"schema": _component(wire_types.Chunk, schemas)}
    done["headers"] = {name: {"description": text, "schema": {"type": "string"}} for name, text in HEADERS.items()}
    error = {
        "description": "Any error, in OpenAI's shape.",
        "content": _json(_component(wire_types.ErrorBody, schemas)),
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "thinkserve", "version": __version__, "description": DESCRIPTION + ", ".join(REFUSED) + "."},
        "paths": dict(sorted(paths.items())),
        "components": {
            "schemas": dict(sorted(schemas.items())),
            "responses": {"Error": error},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


REQUEST_HEADERS = {
    "X-Reasoning-Strategy": "Strategy with parameters, for tools that can only set headers: `short-m-at-k; k=8; m=3`.",
    "X-Request-Timeout-Ms": "Deadline of the whole request in milliseconds.",
    "X-Request-Id": "The client's own id; echoed in X-Client-Request-Id and never used for anything else.",
}


def published() -> str:
    """The document as openapi.yaml holds it; no engine is started."""
    # Imported here because the app, in turn, serves this document.
    from thinkserve.server.app import create_app
    from thinkserve.server.settings import Settings
    from thinkserve.server.testing import ScriptedBackend
    from thinkserve.strategies.testing import ScriptedEngine

    app = create_app(Settings.model_construct(), ScriptedBackend(ScriptedEngine([])))
    return yaml.safe_dump(document(app), sort_keys=False, width=120, allow_unicode=True)


def _complete(operation: Schema, answer: type | None, schemas: Schema) -> None:
    responses = operation["responses"]
    responses.pop("422", None)  # FastAPI's own validation; here every client error has the shape below
    responses["default"] = {"$ref": "#/components/responses/Error"}
    if answer is not None:
        responses["200"]["content"] = _json(_component(answer, schemas))


def _vectors(operations: Schema, schemas: Schema) -> None:
    """The body that is a file, and the answers that are not the card of a vector."""
    file = {"application/octet-stream": {"schema": {"type": "string", "format": "binary", "title": "safetensors"}}}
    operations["put"]["requestBody"] = {"required": True, "content": file}
    operations["put"]["responses"]["201"]["content"] = _json(_component(vector_types.VectorCard, schemas))
    operations["delete"]["responses"]["200"]["content"] = _json(_component(vector_types.VectorDeleted, schemas))


def _request(schemas: Schema) -> Schema:
    reference = _component(ChatRequest, schemas)
    branches = [_branch(registry.get(name), schemas) for name in registry.names()]
    by_name = {"type": "string", "description": "Name of a strategy or preset."}
    choice = {"anyOf": [by_name, *branches, {"type": "null"}], "default": None}
    schemas["ChatRequest"]["properties"]["strategy"] = choice
    schemas.pop("StrategyChoice")
    return reference


def _branch(strategy: Strategy, schemas: Schema) -> Schema:
    """The object form of one strategy: StrategyChoice with its own `params`."""
    options = _component(strategy.options, schemas)
    shape = StrategyChoice.model_json_schema(ref_template=COMPONENTS + "{model}")
    shape["properties"]["name"] = {"enum": [strategy.id, *strategy.aliases], "type": "string"}
    shape["properties"]["params"] = options
    title = "".join(word.capitalize() for word in strategy.id.split("-")) + "Choice"
    schemas[title] = {**shape, "title": title, "description": strategy.summary}
    return {"$ref": COMPONENTS + title}


def _component(kind: type, schemas: Schema) -> Schema:
    """A reference to the schema of `kind`, which is added with everything that it refers to."""
    schema = TypeAdapter(kind).json_schema(ref_template=COMPONENTS + "{model}")
    schemas.update(schema.pop("$defs", {}))
    if "$ref" not in schema:
        schemas[kind.__name__] = schema
    return {"$ref": COMPONENTS + kind.__name__}


def _json(schema: Schema) -> Schema:
    return {"application/json": {"schema": schema}}


def _parameter(name: str, text: str) -> Mapping[str, Any]:
    return {"name": name, "in": "header", "required": False, "description": text, "schema": {"type": "string"}}
