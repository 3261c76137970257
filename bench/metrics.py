"""Reads vLLM's Prometheus counters over HTTP: what the engine itself says it generated. Both servers expose them."""

from __future__ import annotations

import anyio

from bench.client import Address, BadReply, get

GENERATED = "vllm:generation_tokens_total"
BUSY = ("vllm:num_requests_running", "vllm:num_requests_waiting")
SETTLE_TIMEOUT_S = 60.0
POLL_S = 0.005


def total(text: str, name: str) -> float:
    """Sum of a metric over its label sets. KeyError when there is none of that name."""
    values = [float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith((f"{name} ", f"{name}{{"))]
    if not values:
        raise KeyError(name)
    return sum(values)


async def settled(address: Address) -> int:
    """Tokens generated since the server started, read once nothing runs any more. BadReply when it never rests."""
    last = -1
    with anyio.move_on_after(SETTLE_TIMEOUT_S):
        while True:
            text = (await get(address, "/metrics")).body.decode()
            generated, busy = int(total(text, GENERATED)), sum(total(text, name) for name in BUSY)
            if generated == last and not busy:
                return generated
            last = generated
            await anyio.sleep(POLL_S)
    raise BadReply("the engine does not come to rest")
