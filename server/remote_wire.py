"""The wire of vLLM's completions endpoint, as pure functions: a job as a request's body, a stream's data as chunks.

Tokens travel as ids in both directions: `return_token_ids` for what was sampled, `return_tokens_as_token_ids` for the
alternatives, which come as "token_id:N". vLLM writes a log-probability of minus infinity as -9999.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b

from thinkserve.strategies.engine import Job, ModelInfo, Tokens

Pairs = tuple[tuple[int, float], ...]

_PLACEHOLDER = "token_id:"
_LEAST = -9999.0
# What rounding may leave above the logarithm of 1.
_MOST = 1e-3


class Malformed(ValueError):
    """The other side sent what vLLM does not send; the message says what, for the operator."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """One data line. `generated` and `cached` are what its usage says, if it has any; `error` ends the stream.

    vLLM looks at most of a job after it has begun to answer: then the `code` of a refusal is here and no status.
    """

    tokens: Tokens = ()
    logprobs: tuple[float, ...] = ()
    top: tuple[Pairs, ...] = ()
    finish: str | None = None
    generated: int = 0
    cached: int | None = None
    error: str | None = None
    code: int = 0


def salted(salt: str | None) -> dict[str, str]:
    """The cache salt in characters that vLLM takes; what it was cannot be read from it."""
    return {} if salt is None else {"cache_salt": blake2b(salt.encode(), digest_size=16).hexdigest()}


def completion(job: Job, info: ModelInfo, budget: int | None) -> dict[str, object]:
    """The sampling half of a request's body; nothing is left to the other server's defaults."""
    draw = job.sampling
    body: dict[str, object] = {
        "prompt": job.prompt,
        "max_tokens": min(job.max_tokens, info.context - len(job.prompt)),
        "temperature": draw.temperature,
        "top_p": draw.top_p,
        "top_k": draw.top_k,
        "min_p": draw.min_p,
        "presence_penalty": draw.presence_penalty,
        "frequency_penalty": draw.frequency_penalty,
        "repetition_penalty": draw.repetition_penalty,
        "stop": job.stop,
        "stop_token_ids": job.stop_tokens,
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
        "return_token_ids": True,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    if draw.logit_bias:
        # vLLM cuts a bias to this range; infinities are not JSON.
        body["logit_bias"] = {str(token): max(-100.0, min(100.0, bias)) for token, bias in draw.logit_bias}
    if job.seed is not None:
        body["seed"] = job.seed % 2**63
    if budget is not None:
        body["thinking_token_budget"] = budget
    if job.logprobs is not None:
        body |= {"logprobs": job.logprobs, "return_tokens_as_token_ids": True}
    return body


def chunk(data: bytes, job: Job, vocab_size: int) -> Chunk:
    """What a data line says. Raises Malformed. Ids must lie below `vocab_size` if that is known (not 0)."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Malformed("sent a line that is not JSON") from error
    if not isinstance(found, dict):
        raise Malformed("sent a line that is not a JSON object")
    if (error_body := found.get("error")) is not None:
        named = error_body if isinstance(error_body, dict) else {"message": error_body}
        return Chunk(error=str(named.get("message")), code=_count(named.get("code")) or 0)
    generated, cached = _usage(found.get("usage"), len(job.prompt))
    match found.get("choices"):
        case []:
            return Chunk(generated=generated, cached=cached)
        case [dict() as choice]:
            return _choice(choice, job, vocab_size, generated, cached)
    raise Malformed("sent a line without its one choice")


def ids(found: object, vocab_size: int = 0) -> Tokens:
    """A list of token ids. Raises Malformed."""
    if not isinstance(found, list):
        raise Malformed("does not send token ids: is it a vLLM server?")
    bound = vocab_size or math.inf
    if not all(type(token) is int and 0 <= token < bound for token in found):
        raise Malformed("sent a token that is not in its vocabulary")
    return tuple(found)


def _usage(found: object, prompt: int) -> tuple[int, int | None]:
    """Tokens generated, and found in the cache: no more than the prompt has."""
    if not isinstance(found, dict):
        return 0, None
    details = found.get("prompt_tokens_details")
    cached = _count(details.get("cached_tokens")) if isinstance(details, dict) else None
    return _count(found.get("completion_tokens")) or 0, None if cached is None else min(cached, prompt)


def _count(found: object) -> int | None:
    return found if type(found) is int and found >= 0 else None


def _choice(choice: Mapping[str, object], job: Job, vocab_size: int, generated: int, cached: int | None) -> Chunk:
    tokens, finish = ids(choice.get("token_ids"), vocab_size), choice.get("finish_reason")
    if finish is not None and not isinstance(finish, str):
        raise Malformed("ends a stream in a way of its own")
    logprobs, top = ((), ()) if job.logprobs is None else _logprobs(choice.get("logprobs"), len(tokens), job.logprobs)
    return Chunk(tokens, logprobs, top, finish, generated, cached)


def _logprobs(found: object, count: int, wanted: int) -> tuple[tuple[float, ...], tuple[Pairs, ...]]:
    """Log-probabilities of `count` tokens, and of `wanted` alternatives to each."""
    if not count:
        return (), ()
    match found:
        case {"token_logprobs": list() as sampled, "top_logprobs": list() as top} if len(sampled) == count == len(top):
            return tuple(map(_number, sampled)), tuple(_best(each, wanted) for each in top) if wanted else ()
    raise Malformed("left out the log-probability of a token")


def _best(found: object, wanted: int) -> Pairs:
    """The `wanted` most probable tokens, best first; vLLM names the sampled one first, be it one of them or not."""
    if not isinstance(found, dict):
        raise Malformed("left out the alternatives to a token")
    pairs = [(_token(name), _number(value)) for name, value in found.items()]
    if len(pairs) > wanted:
        del pairs[0]
    return tuple(sorted(pairs, key=lambda pair: -pair[1]))


def _token(name: str) -> int:
    digits = name.removeprefix(_PLACEHOLDER)
    if digits == name or not (digits.isascii() and digits.isdecimal()) or len(digits) > 9:
        raise Malformed("names a token by its text where its id was asked for")
    return int(digits)


def _number(found: object) -> float:
    """A log-probability. NaN is in no range; a whole number may be too large for a float until it has been compared."""
    if isinstance(found, bool) or not isinstance(found, int | float) or not -math.inf < found <= _MOST:
        raise Malformed("sent something that is no log-probability")
    return -math.inf if found <= _LEAST else float(found)
