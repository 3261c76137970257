"""Plain-chat throughput: our server (`single`) against vLLM's own, the same requests from the same client.

Both servers are up and take turns, load by load, so that a drift of the machine falls on both; the one that waits takes
under two hundredths of a core. A measurement is one closed loop: `concurrency` requests are always in flight until a
fixed list of them is done. Its figure is generated tokens per second of wall time, tokens as the server's usage counts
them, parsed after the clock has stopped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter, process_time
from typing import Any

import anyio

from bench.client import Reply, encode, send
from bench.harness import Options, Work
from bench.servers import Server
from bench.tasks import Problem

SERVERS = ("thinkserve", "vllm")


@dataclass(frozen=True, slots=True)
class Cell:
    """One kind of load."""

    concurrency: int
    streaming: bool

    @property
    def name(self) -> str:
        """As it is called in keys and tables."""
        return f"{self.concurrency} {'streamed' if self.streaming else 'plain'}"


def cells(options: Options) -> list[Cell]:
    """All kinds of load, in the order of measuring."""
    return [Cell(level, streaming) for level in options.chat_levels for streaming in (False, True)]


def schedule(options: Options) -> Iterator[tuple[str, str, Cell, int]]:
    """Key, server, cell and round of all measurements; each server begins every other round."""
    for number in range(options.chat_rounds):
        for cell in cells(options):
            for server in SERVERS[:: (-1) ** number]:
                yield f"serve/{cell.name}/{server}/{number}", server, cell, number


def prompts(problems: Sequence[Problem], cell: Cell, number: int, options: Options) -> list[str]:
    """The questions of one measurement, some seconds' worth: the same for both servers, other ones for each round."""
    size = options.chat_waves * (cell.concurrency + 3)
    return [problems[(number * size + index) % len(problems)].question for index in range(size)]


async def measure(servers: Mapping[str, Server], problems: Sequence[Problem], work: Work) -> None:
    """Fill the journal with the measurements of both servers, after loads that only warm up."""
    options, warm_up = work.options, Cell(max(work.options.chat_levels), True)
    for server in servers.values():
        await _load(server, warm_up, prompts(problems, warm_up, 0, options), options)
    for key, name, cell, number in schedule(options):
        if key not in work.journal:
            work.journal.put(key, await _load(servers[name], cell, prompts(problems, cell, number, options), options))
            work.advance()


async def _load(server: Server, cell: Cell, questions: Sequence[str], options: Options) -> dict[str, float]:
    requests = [encode("POST", "/v1/chat/completions", body(server, cell, question, options)) for question in questions]
    replies, todo = list[Reply](), iter(requests)

    async def work() -> None:
        for request in todo:
            replies.append(await send(server.address, request))

    start, client = perf_counter(), process_time()
    async with anyio.create_task_group() as group:
        for _ in range(cell.concurrency):
            group.start_soon(work)
    seconds, client_cpu_s = perf_counter() - start, process_time() - client
    tokens = sum(generated(reply, cell.streaming) for reply in replies)
    return {
        "seconds": seconds,
        "tokens": tokens,
        "client_cpu_s": client_cpu_s,
        "requests": len(replies),
        "first_ms": 1000 * median(reply.first_s for reply in replies),
        "last_ms": 1000 * median(reply.last_s for reply in replies),
    }


def generated(reply: Reply, streaming: bool) -> int:
    """Completion tokens that the reply's usage reports."""
    final = reply.events()[-1] if streaming else reply.json()
    return int(final["usage"]["completion_tokens"])


def body(server: Server, cell: Cell, question: str, options: Options) -> dict[str, Any]:
    """An ordinary chat request, as any client sends it: no seed, no strategy."""
    plain = {
        "model": server.model,
        "messages": [{"role": "user", "content": question}],
        "max_completion_tokens": options.chat_tokens,
        "temperature": options.temperature,
        "top_p": options.top_p,
    }
    return plain | ({"stream": True, "stream_options": {"include_usage": True}} if cell.streaming else {})
