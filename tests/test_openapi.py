"""openapi.yaml is what the app says of itself, and what it says is true."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from thinkserve.server.app import create_app
from thinkserve.server.errors import ApiError
from thinkserve.server.openapi import document, published
from thinkserve.server.protocol import ChatRequest, parse_chat
from thinkserve.server.settings import Settings
from thinkserve.server.testing import ScriptedBackend
from thinkserve.strategies import registry
from thinkserve.strategies.testing import ScriptedEngine, example

PUBLISHED = Path(__file__).resolve().parents[1] / "openapi.yaml"
USER = {"role": "user", "content": "1+1"}


@pytest.fixture(scope="module")
def built() -> dict[str, Any]:
    return document(create_app(Settings(), ScriptedBackend(ScriptedEngine([]))))


def references(node: object) -> Iterator[str]:
    if isinstance(node, dict):
        yield from (value for key, value in node.items() if key == "$ref")
        for value in node.values():
            yield from references(value)
    elif isinstance(node, list):
        for value in node:
            yield from references(value)


def validator(built: dict[str, Any], name: str) -> Draft202012Validator:
    return Draft202012Validator({"$ref": f"#/components/schemas/{name}", "components": built["components"]})


def test_the_file_in_the_repository_is_the_document_of_the_app(built: dict[str, Any]) -> None:
    """`make generate` writes it again."""
    assert yaml.safe_load(published()) == built
    assert PUBLISHED.read_text(encoding="utf-8") == published()


def test_every_reference_leads_somewhere_and_every_schema_is_used(built: dict[str, Any]) -> None:
    """No dangling and no forgotten parts."""
    found = set(references(built))
    for reference in found:
        node: Any = built
        for step in reference.removeprefix("#/").split("/"):
            node = node[step]
    assert {f"#/components/schemas/{name}" for name in built["components"]["schemas"]} <= found


def test_every_schema_is_a_valid_one(built: dict[str, Any]) -> None:
    """JSON Schema 2020-12, as OpenAPI 3.1 has it."""
    for schema in built["components"]["schemas"].values():
        Draft202012Validator.check_schema(schema)


def test_every_route_documents_its_errors_in_the_one_shape(built: dict[str, Any]) -> None:
    """And none mentions the 422 of the framework, which never occurs."""
    operations = [operation for path in built["paths"].values() for operation in path.values()]
    assert len({operation["operationId"] for operation in operations}) == len(operations)
    for operation in operations:
        assert operation["responses"]["default"] == {"$ref": "#/components/responses/Error"}
        assert "422" not in operation["responses"]


def test_the_request_knows_every_strategy_with_its_parameters(built: dict[str, Any]) -> None:
    """Also under its aliases; a misspelt parameter breaks the schema."""
    chat = validator(built, "ChatRequest")
    for name in registry.names():
        entry = registry.get(name)
        for called in (name, *entry.aliases):
            params = example(entry).model_dump(mode="json")
            body = {"model": "m", "messages": [USER], "strategy": {"name": called, "params": params}}
            assert chat.is_valid(body)
            assert not chat.is_valid({**body, "strategy": {"name": called, "params": {"zzz": 1}}})


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"strategy": "majority", "stream": True, "stream_options": {"include_usage": True}},
        {"strategy": {"name": "short-m-at-k", "params": {"k": 4, "m": 1}, "timeout_s": 9}, "stop": ["a", "b"]},
        {"reasoning": {"effort": "low"}, "temperature": 0, "logit_bias": {"3": -1}, "seed": None, "unknown": 1},
        {"messages": [USER, {"role": "assistant", "content": None, "reasoning": "r"}], "stop": "x", "top_k": -1},
        {"temperature": 2.5},
        {"messages": [{"role": "wizard", "content": "x"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        {"max_tokens": 0},
        {"reasoning_effort": "huge"},
        {"logprobs": "yes"},
        {"strategy": {"name": "majority", "parms": {}}},
    ],
)
def test_schema_and_server_agree_on_a_request(built: dict[str, Any], extra: dict[str, Any]) -> None:
    """A client that validates before it sends is told the same."""
    body = {"model": "m", "messages": [USER], **extra}
    try:
        outcome: ChatRequest | ApiError = parse_chat(body)
    except ApiError as error:
        outcome = error
    assert validator(built, "ChatRequest").is_valid(body) is isinstance(outcome, ChatRequest)


def test_every_field_of_the_request_is_in_the_document(built: dict[str, Any]) -> None:
    """Nothing is understood in secret."""
    assert set(built["components"]["schemas"]["ChatRequest"]["properties"]) == set(ChatRequest.model_fields)
