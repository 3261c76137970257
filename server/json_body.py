"""A request body as a JSON object, read more strictly than `json` does.

Refused: NaN, infinities and numbers that overflow to them, negative zero, integers beyond 64 bits, duplicate keys,
nesting beyond 64 levels, objects of more than 4096 keys, lone surrogates, a byte-order mark, anything that is not UTF-8
or not an object. The size of the body is the middleware's business.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from anyio import to_thread
from starlette.requests import Request

from thinkserve.server.errors import ApiError, clean
from thinkserve.steering.vector_file import deeper_than

MAX_DEPTH = 64
MAX_KEYS = 4096  # each may be a complaint, and making a million of them would hold up every other request
OFF_LOOP_BYTES = 64 * 1024  # larger bodies are parsed in a thread, so that other requests keep moving
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


async def read_json(request: Request) -> dict[str, Any]:
    """The body as a dict. Raises ApiError 400 (what is wrong with the JSON) or 415 (not JSON at all)."""
    raw = await read_body(request)
    if len(raw) > OFF_LOOP_BYTES:
        return await to_thread.run_sync(parse, raw)
    return parse(raw)


async def read_body(request: Request) -> bytes:
    """The body, received once and kept with the request. Raises ApiError 415 before any of it has come."""
    check_headers(request.headers.get("content-type", ""), request.headers.get("content-encoding", ""))
    return await request.body()


def check_headers(content_type: str, content_encoding: str) -> None:
    """ApiError 415 unless the body is declared as plain, uncompressed UTF-8 JSON."""
    kind, _, rest = content_type.partition(";")
    if kind.strip().lower() != "application/json":
        raise ApiError(415, "unsupported_media_type", "The Content-Type of the body must be application/json.")
    charset = re.search(r'charset\s*=\s*"?([^";\s]+)', rest, re.IGNORECASE)
    if charset and charset[1].lower() not in {"utf-8", "utf8"}:
        raise ApiError(415, "unsupported_media_type", "The body must be UTF-8.")
    if content_encoding.strip().lower() not in {"", "identity"}:
        raise ApiError(415, "unsupported_media_type", "Compressed bodies are not accepted.")


def parse(raw: bytes) -> dict[str, Any]:
    """The object in `raw`. Raises ApiError 400: invalid_json, invalid_type or value_out_of_range."""
    odd: list[str] = []
    try:
        text = raw.decode("utf-8")
        value = json.loads(
            text,
            parse_constant=lambda literal: _oddity(odd, literal),
            parse_float=lambda literal: _float(odd, literal),
            parse_int=lambda literal: _int(odd, literal),
            object_pairs_hook=_object,
        )
    except UnicodeDecodeError as error:
        raise _invalid(f"The body is not UTF-8 (byte {error.start}).") from None
    except json.JSONDecodeError as error:
        raise _invalid(f"The body is not JSON: {error.msg} (line {error.lineno}, column {error.colno}).") from None
    except RecursionError:
        raise _deep() from None
    if not isinstance(value, dict):
        raise ApiError(400, "invalid_type", f"The body must be a JSON object, not {_name(value)}.")
    if deeper_than(MAX_DEPTH, value):
        raise _deep()
    if odd:
        where = next((path for path, leaf in _walk(value) if isinstance(leaf, float) and math.isnan(leaf)), None)
        raise ApiError(400, "value_out_of_range", f"The number {clean(odd[0], 24)} is out of range.", param=where)
    if SURROGATE.search(text):
        _check_surrogates(value)
    return value


def _oddity(odd: list[str], literal: str) -> float:
    odd.append(literal)
    return math.nan


def _float(odd: list[str], literal: str) -> float:
    value = float(literal)
    negative_zero = value == 0 and literal.startswith("-")
    return value if math.isfinite(value) and not negative_zero else _oddity(odd, literal)


def _int(odd: list[str], literal: str) -> int | float:
    if len(literal) <= 20 and abs(value := int(literal)) < 2**64:
        return value
    return _oddity(odd, literal)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise _invalid(f"The key {clean(twice)!r} occurs twice in one object.")
    if len(pairs) > MAX_KEYS:
        raise ApiError(400, "value_out_of_range", f"An object of the body has more than {MAX_KEYS} keys.")
    return value


def _walk(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf and every key with its dotted path; the depth is known to be small."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield path, key
            yield from _walk(item, f"{path}.{clean(key)}" if path else clean(key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _walk(item, f"{path}.{index}")
    else:
        yield path, value


def _check_surrogates(value: dict[str, Any]) -> None:
    for path, leaf in _walk(value):
        if isinstance(leaf, str) and any("\ud800" <= char <= "\udfff" for char in leaf):
            raise ApiError(400, "invalid_json", "A string holds half of a surrogate pair.", param=path or None)


def _deep() -> ApiError:
    return _invalid(f"The body is nested more than {MAX_DEPTH} levels deep.")


def _invalid(message: str) -> ApiError:
    return ApiError(400, "invalid_json", message)


def _name(value: object) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, str):
        return "a string"
    return "an array" if isinstance(value, list) else "a number"
