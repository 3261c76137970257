"""Each field of a chat request is honoured, refused by name, or ignored and listed."""

from __future__ import annotations

from collections.abc import Mapping
from time import monotonic
from typing import Any

import pytest

from thinkserve.server.errors import ApiError
from thinkserve.server.protocol import MAX_MESSAGES, REFUSED, ChatRequest, parse_chat

USER = {"role": "user", "content": "1+1"}
NO_COUNTS: list[object] = [0, -1, 10**9, True, 1.0]
NO_STOPS: list[object] = [["a"] * 5, "", ["a", ""], "x" * 10**6, ["x"] * 10**4, 5, {}]


def read(extra: Mapping[str, Any] = {}) -> ChatRequest:
    return parse_chat({"model": "arith-small", "messages": [USER], **extra})


def refusal(extra: Mapping[str, Any]) -> ApiError:
    with pytest.raises(ApiError) as caught:
        read(extra)
    return caught.value


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ({"role": "assistant", "content": "c", "reasoning": "r"}, None),
        ({"role": "assistant", "reasoning_content": "r"}, None),
        ({"role": "assistant", "content": "c", "reasoning": "r", "reasoning_content": "r"}, None),
        ({"role": "assistant", "content": "c", "reasoning": "r", "reasoning_content": "s"}, "value_out_of_range"),
        ({"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}]}, None),
        ({"role": "user", "content": "nul \u0000 is text"}, None),
        ({"role": "user"}, "missing_field"),
        ({"role": "user", "content": None}, "missing_field"),
        ({"role": "assistant", "content": None}, "missing_field"),
        ({"content": "x"}, "missing_field"),
        ({"role": "wizard", "content": "x"}, "value_out_of_range"),
        ({"role": "user", "content": {}}, "invalid_type"),
        ({"role": "user", "content": 7}, "invalid_type"),
        ({"role": "user", "content": ["x"]}, "invalid_type"),
        ({"role": "user", "content": [{"type": "text"}]}, "missing_field"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]},
            "unsupported_parameter",
        ),
        ({"role": "user", "content": [{"type": "input_audio"}]}, "unsupported_parameter"),
        ("hello", "invalid_type"),
    ],
)
def test_each_kind_of_message_is_accepted_or_refused_by_its_code(message: object, code: str | None) -> None:
    """The history may hold thoughts under either name, but not two different ones; only text is content."""
    extra = {"messages": [message, USER]}
    if code is None:
        assert read(extra).messages[1].text == "1+1"
    else:
        error = refusal(extra)
        assert (error.status, error.code) == (400, code)
        assert error.param is not None
        assert error.param.startswith("messages.0")


@pytest.mark.parametrize(
    ("extra", "code", "param"),
    [
        ({"messages": []}, "missing_field", "messages"),
        ({"messages": None}, "invalid_type", "messages"),
        ({"messages": [USER] * (MAX_MESSAGES + 1)}, "value_out_of_range", "messages"),
        ({"messages": [{"role": "user", "content": [{}] * (MAX_MESSAGES + 1)}]}, "value_out_of_range", "messages"),
        ({"model": 3}, "invalid_type", "model"),
        *[({"max_completion_tokens": bad}, None, "max_completion_tokens") for bad in (0, -1, 2**63, 1.5, "10", True)],
        *[({"temperature": bad}, None, "temperature") for bad in (-1, 2.01, "0.7", True)],
        *[({"top_p": bad}, None, "top_p") for bad in (0, 1.1, "1")],
        ({"min_p": -1}, "value_out_of_range", "min_p"),
        *[({"top_k": bad}, None, "top_k") for bad in (-2, 1.5)],
        *[({"n": bad}, None, "n") for bad in NO_COUNTS],
        *[({"seed": bad}, None, "seed") for bad in (-(2**63) - 1, 2**63, 1.5, "1")],
        *[({"stop": bad}, None, "stop") for bad in NO_STOPS],
        ({"stop": ["a", 1]}, "invalid_type", "stop.1"),
        ({"logit_bias": {"1": 101}}, "value_out_of_range", "logit_bias.1"),
        ({"logit_bias": {str(i): 1 for i in range(300_000)}}, "value_out_of_range", "logit_bias"),
        ({"logit_bias": [1]}, "invalid_type", "logit_bias"),
        ({"stream": "yes"}, "invalid_type", "stream"),
        ({"stream_options": {}}, "value_out_of_range", "stream_options"),
        ({"top_logprobs": 2}, "value_out_of_range", "top_logprobs"),
        ({"top_logprobs": 21, "logprobs": True}, "value_out_of_range", "top_logprobs"),
        ({"chat_template_kwargs": {"tokenize": True}}, "unsupported_parameter", "chat_template_kwargs.tokenize"),
        ({"strategy": {"name": "single", "timeout_s": 0}}, "value_out_of_range", "strategy.timeout_s"),
        ({"strategy": {"name": "single", "max_total_tokens": 0}}, "value_out_of_range", "strategy.max_total_tokens"),
    ],
)
def test_a_field_out_of_its_range_is_refused_at_its_path(extra: dict[str, Any], code: str | None, param: str) -> None:
    """No coercion of strings, booleans or floats; bounds are exact."""
    error = refusal(extra)
    assert (error.status, error.param) == (400, param)
    assert error.code == code if code else error.code in {"invalid_type", "value_out_of_range", "unsupported_parameter"}
    assert len(error.message) < 500


@pytest.mark.parametrize("name", ["model", "messages"])
def test_a_missing_field_is_named(name: str) -> None:
    """`missing_field` with the path."""
    whole = {"model": "arith-small", "messages": [USER]}
    del whole[name]
    with pytest.raises(ApiError) as caught:
        parse_chat(whole)
    assert (caught.value.code, caught.value.param) == ("missing_field", name)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_would_change_the_answer_and_is_not_supported_is_refused(name: str) -> None:
    """Null and the neutral value pass, anything else is `unsupported_parameter`."""
    for neutral in (None, *REFUSED[name]):
        assert read({name: neutral}).model == "arith-small"
    error = refusal({name: 2 if name == "n" else {"type": "json_schema"}})
    assert (error.status, error.code, error.param) == (400, "unsupported_parameter", name)


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"stop": [0] * 500_000}, "stop.0"),
        ({"strategy": {"name": "single", "steer": [{"vector": "v", "layers": [""] * 500_000}]}}, "strategy.steer.0.la"),
    ],
)
def test_a_list_of_mistakes_is_told_in_the_time_of_one(extra: dict[str, Any], param: str) -> None:
    """Complaining about all of them would take seconds, in which nobody else is served."""
    started = monotonic()
    assert str(refusal(extra).param).startswith(param)
    assert monotonic() - started < 0.5


def test_a_neutral_value_of_another_type_is_not_neutral() -> None:
    """False is no zero."""
    assert read({"min_tokens": 0}).model == "arith-small"
    assert refusal({"min_tokens": False}).param == "min_tokens"


def test_unknown_fields_are_ignored_and_listed_but_routine_ones_are_not_listed() -> None:
    """SDKs add fields; the caller can see which ones did nothing."""
    chat = parse_chat({
        "model": "arith-small", "messages": [USER], "user": "u", "store": True, "top_secret": 1, "stream": True,
        "reasoning": {"summary": "auto"}, "stream_options": {"include_usage": True, "beat": 1}, "tools": None,
    })  # fmt: skip
    assert chat.ignored == ("top_secret", "reasoning.summary", "stream_options.beat")
