"""The prefix cache under steering: a block of the KV cache is found again only under the steering that made it.

Steering a token changes what later layers store for it, so its block must not serve a request that is steered
otherwise. vLLM hashes a block together with its parent's hash and extra keys; the key added here says which vectors
acted on which of the block's own tokens, so unsteered tokens before the steered ones stay shared by everybody. It is
installed in the process of the engine core, by our scheduler.
"""

from __future__ import annotations

import sys
from functools import wraps
from typing import Any

from thinkserve.server.vllm_worker import KEY

_OURS = "_thinkserve"
_OPEN = "_thinkserve_open"


def install() -> None:
    """Make vLLM's block hashes depend on steering, in this process; once is enough, twice does no harm."""
    from vllm.v1.core import block_pool, kv_cache_utils

    stock = kv_cache_utils.generate_block_hash_extra_keys
    if hasattr(stock, _OURS):
        return

    @wraps(stock)
    def generate_block_hash_extra_keys(request: Any, start: int, end: int, mm_index: int) -> Any:
        keys, mm_index = stock(request, start, end, mm_index)
        steered = block_key(request, start, end)
        return (keys if steered is None else (*(keys or ()), (KEY, steered))), mm_index

    setattr(generate_block_hash_extra_keys, _OURS, True)
    # Those that are imported later take the name from the first of them.
    for module in (kv_cache_utils, block_pool, sys.modules.get("vllm.v1.simple_kv_offload.manager")):
        if module is not None:
            setattr(module, stock.__name__, generate_block_hash_extra_keys)


def block_key(request: Any, start: int, end: int) -> tuple[tuple[object, ...], ...] | None:
    """What acted on the tokens [start, end) of a request: (vector id, scale, column, first, last + 1) in the block."""
    extra = getattr(request.sampling_params, "extra_args", None)
    entries = ((extra or {}).get(KEY) or {}).get("steer")
    if not entries:
        return None
    found: list[tuple[object, ...]] = []
    for vector, scale, begin, stop, close, column in entries:
        low = max(begin, start)
        high = end if stop is None else min(stop, end)
        if close >= 0 and low < high:
            high = min(high, _close(request, close, begin + 1, end))
        if low < high:
            found.append((vector, float(scale), column, low - start, high - start))
    return tuple(found) or None


def forget_close(request: Any) -> None:
    """The request's last tokens are about to be taken back: look for the end of thinking anew."""
    request.__dict__.pop(_OPEN, None)


def _close(request: Any, close: int, first: int, end: int) -> int:
    """Position of the first `close` token in [first, end), or `end`; remembers up to where there was none."""
    known = request.__dict__.setdefault(_OPEN, {})
    begin = max(known.get((close, first), first), first)
    try:
        return int(request._all_token_ids.index(close, begin, end))
    except ValueError:
        known[close, first] = max(begin, end)
        return end
