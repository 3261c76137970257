"""Every exception becomes one shape, and no exception text of ours leaks."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.exceptions import HTTPException

from thinkserve.server.errors import TABLE, ApiError, RoleFailed, body, clean, from_exception
from thinkserve.strategies.errors import (
    BadOptions,
    EngineDead,
    EngineFailed,
    ReasoningError,
    TooLong,
    UnknownStrategy,
    Unsupported,
)


@pytest.mark.parametrize(
    ("exc", "status", "code", "param"),
    [
        (BadOptions("m is above k", "m"), 400, "value_out_of_range", "strategy.params.m"),
        (BadOptions("no"), 400, "value_out_of_range", "strategy.params"),
        (UnknownStrategy("shrot", ["short-m-at-k"]), 400, "unknown_strategy", "strategy"),
        (Unsupported("no reward model", "strategy"), 400, "strategy_unavailable", "strategy"),
        (Unsupported("no budgets here", "thinking_budget"), 400, "unsupported_parameter", "thinking_budget"),
        (TooLong(5000, 4096), 400, "context_length_exceeded", "messages"),
        (EngineDead("pid 17 at 0x7f gone"), 503, "engine_unavailable", None),
        (EngineFailed("cuda error in /srv/x.py"), 500, "internal_error", None),
        (RoleFailed("verifier"), 502, "verifier_failed", None),
        (RoleFailed("reward"), 502, "prm_unavailable", None),
        (TimeoutError(), 504, "deadline_exceeded", None),
        (HTTPException(404), 404, "route_not_found", None),
        (HTTPException(405, headers={"Allow": "GET"}), 405, "method_not_allowed", None),
        (HTTPException(500), 500, "internal_error", None),
        (RuntimeError("secret /etc/passwd 0xdeadbeef"), 500, "internal_error", None),
        (ApiError(429, "rate_limit_exceeded", "slow down", "rate_limit_error"), 429, "rate_limit_exceeded", None),
    ],
)
def test_each_exception_has_its_status_and_code(exc: Exception, status: int, code: str, param: str | None) -> None:
    """The table, row by row."""
    error = from_exception(exc, "req_1")
    assert (error.status, error.code, error.param) == (status, code, param)


@pytest.mark.parametrize(
    "exc",
    [
        RuntimeError("secret 0xdead /etc"),
        EngineFailed("0x7f /srv"),
        EngineDead("0x7f /srv"),
        RoleFailed("guide"),
    ],
)
def test_words_of_unexpected_exceptions_stay_inside(exc: Exception) -> None:
    """Neither addresses nor paths nor the exception's text reach the client."""
    text = json.dumps(body(from_exception(exc, "req_1")))
    assert not any(leak in text for leak in ("0x", "/", "secret", "Traceback"))


def test_server_faults_that_would_be_paid_twice_forbid_a_retry() -> None:
    """OpenAI clients retry 500 and 504 on their own unless told otherwise; 503 says when to come back."""
    assert from_exception(EngineFailed(""), "r").headers["x-should-retry"] == "false"
    assert from_exception(TimeoutError(), "r").headers["x-should-retry"] == "false"
    assert from_exception(RoleFailed("reward"), "r").headers["x-should-retry"] == "false"
    assert 1 <= int(from_exception(EngineDead(""), "r").headers["Retry-After"]) <= 30


def test_the_mildest_member_of_a_group_speaks_for_it() -> None:
    """A task group wraps what a strategy raised; the client's own fault must still be a 400."""
    group = ExceptionGroup("g", [ValueError("x"), ExceptionGroup("h", [EngineFailed("y"), BadOptions("z", "k")])])
    assert from_exception(group, "r").status == 400


def test_every_reasoning_error_has_a_translation() -> None:
    """A new exception in the tree without a row in the table would be a bare 500."""
    translated = {kind for kind, _ in TABLE}
    assert set(ReasoningError.__subclasses__()) <= translated


@given(text=st.text(st.characters(exclude_categories=())))
def test_echoed_text_is_short_printable_and_encodable(text: str) -> None:
    """A lone surrogate or a control character in an error message must not become a 500."""
    shown = clean(text)
    assert len(shown) <= 83
    assert shown.isprintable()
    shown.encode()


@given(message=st.text(st.characters(exclude_categories=())), param=st.text(st.characters(exclude_categories=())))
def test_every_error_body_is_valid_json_in_openais_shape(message: str, param: str) -> None:
    """Four keys under `error`, and a string code."""
    shape = body(ApiError(400, "invalid_type", message, param=param))
    json.dumps(shape, ensure_ascii=False).encode()
    assert isinstance(shape["error"], dict)
    assert set(shape["error"]) == {"message", "type", "param", "code"}
