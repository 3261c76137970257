"""Bodies that are not plain JSON objects are refused with the right code, and nothing else ever comes out."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinkserve.server.errors import ApiError, body
from thinkserve.server.json_body import MAX_DEPTH, MAX_KEYS, check_headers, parse

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(0, allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def refusal(raw: bytes) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse(raw)
    assert caught.value.status == 400
    json.dumps(body(caught.value), allow_nan=False).encode()
    return caught.value


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b"", "invalid_json"),
        (b'{"a": ', "invalid_json"),
        (b'{"a": 1} x', "invalid_json"),
        (b'{"a": "\xff"}', "invalid_json"),
        ("{}".encode("utf-16"), "invalid_json"),
        (b"\xef\xbb\xbf{}", "invalid_json"),
        (b'{"a": 1, "b": 2, "a": 3}', "invalid_json"),
        (b'{"a": "\\ud800"}', "invalid_json"),
        (b'{"\\uDFff": 1}', "invalid_json"),
        (b"[" * 100_000, "invalid_json"),
        (b'{"a":' * 500 + b"1" + b"}" * 500, "invalid_json"),
        (b"[1]", "invalid_type"),
        (b'"x"', "invalid_type"),
        (b"1", "invalid_type"),
        (b"null", "invalid_type"),
        (b'{"a": NaN}', "value_out_of_range"),
        (b'{"a": -Infinity}', "value_out_of_range"),
        (b'{"a": 1e999}', "value_out_of_range"),
        (b'{"a": -0.0}', "value_out_of_range"),
        (b'{"a": ' + b"9" * 5000 + b"}", "value_out_of_range"),
        (b'{"a": 18446744073709551616}', "value_out_of_range"),
        (json.dumps({"a": {str(key): 0 for key in range(MAX_KEYS + 1)}}).encode(), "value_out_of_range"),
    ],
)
def test_what_is_not_a_plain_json_object_is_refused_by_its_own_code(raw: bytes, code: str) -> None:
    """Each way of being wrong has one stable code."""
    assert refusal(raw).code == code


@pytest.mark.parametrize(
    "raw", [b"{}", b'{"a": "\\u0000"}', b'{"a": "\\ud83d\\ude00"}', b'{"a": -1, "b": 0.5, "c": 1e-300}']
)
def test_unusual_but_valid_json_is_read(raw: bytes) -> None:
    """NUL, surrogate pairs and small numbers are fine."""
    assert parse(raw) == json.loads(raw)


def test_an_odd_number_is_reported_with_its_path() -> None:
    """The dotted path leads through objects and arrays."""
    assert refusal(b'{"messages": [{"x": 1}, {"weight": NaN}]}').param == "messages.1.weight"


def test_nesting_up_to_the_limit_is_read_and_one_level_more_is_not() -> None:
    """The limit is exact."""

    def nested(levels: int) -> bytes:
        return b'{"a":' + b"[" * (levels - 1) + b"]" * (levels - 1) + b"}"

    assert parse(nested(MAX_DEPTH))
    assert refusal(nested(MAX_DEPTH + 1)).code == "invalid_json"


def test_many_duplicate_keys_are_found_in_linear_time() -> None:
    """A hundred thousand keys with one repeated at the end do not stall the server."""
    pairs = ",".join(f'"k{i}":1' for i in range(100_000))
    assert "k99999" in refusal(f'{{{pairs},"k99999":2}}'.encode()).message


@given(value=st.dictionaries(st.text(), JSON, max_size=5))
def test_every_json_object_comes_back_unchanged(value: dict[str, Any]) -> None:
    """Strictness costs no valid body."""
    assert parse(json.dumps(value).encode()) == value


@given(raw=st.binary(max_size=60))
def test_arbitrary_bytes_give_a_dict_or_a_400(raw: bytes) -> None:
    """Nothing else escapes."""
    outcome: dict[str, Any] | ApiError
    try:
        outcome = parse(raw)
    except ApiError as error:
        outcome = error
    assert isinstance(outcome, dict) or outcome.status == 400


@pytest.mark.parametrize(
    ("content_type", "encoding"),
    [
        ("", ""),
        ("text/plain", ""),
        ("multipart/form-data; boundary=x", ""),
        ("application/x-www-form-urlencoded", ""),
        ("application/json; charset=utf-16", ""),
        ("application/json", "gzip"),
    ],
)
def test_a_body_that_is_not_declared_as_plain_json_is_415(content_type: str, encoding: str) -> None:
    """No guessing, no decompression."""
    with pytest.raises(ApiError) as caught:
        check_headers(content_type, encoding)
    assert (caught.value.status, caught.value.code) == (415, "unsupported_media_type")


@pytest.mark.parametrize(
    "content_type", ["application/json", "Application/JSON ; charset=UTF-8", 'application/json;charset="utf-8"']
)
def test_json_in_utf8_is_accepted_however_it_is_spelled(content_type: str) -> None:
    """Case and parameters do not matter."""
    check_headers(content_type, "identity")
