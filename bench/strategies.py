"""Accuracy, tokens and time of strategies, beside what a client can do with vLLM's own server.

A row is one way to answer a problem. Rows of one server take turns on the same chunk of problems, in rotating order, so
that a drift of the machine hits all of them; the engine's token counter is read around every chunk, with nothing
running.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal

from bench.client import encode, opened, send
from bench.harness import Options, Work, at_once
from bench.metrics import settled
from bench.servers import Server
from bench.tasks import Problem, Tokenizer, correct, vote

K, M = 8, 3
DRIFT = "majority@8 again"


@dataclass(frozen=True, slots=True)
class Asked:
    """What an answer cost: `answers` counts the answer tokens of all chains; `total` None: only the engine knows."""

    content: str
    wall_s: float
    answers: int
    total: int | None


Ask = Callable[[Server, dict[str, Any], Tokenizer], Awaitable[Asked]]


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the table: its name, the server it needs, and how it asks."""

    name: str
    server: Literal["thinkserve", "vllm"]
    ask: Ask


def strategy(name: str, **params: object) -> Ask:
    """Our server, one plain request that names a strategy."""

    async def ask(server: Server, body: dict[str, Any], tokenizer: Tokenizer) -> Asked:
        request = encode("POST", "/v1/chat/completions", body | {"strategy": {"name": name, "params": params}})
        reply = await send(server.address, request)
        parsed = reply.json()
        usage, content = parsed["usage"], parsed["choices"][0]["message"]["content"] or ""
        visible = usage["completion_tokens"] - usage["completion_tokens_details"]["reasoning_tokens"]
        finished = usage["strategy"]["chains"]["finished"]
        return Asked(content, reply.last_s, visible * finished, usage["completion_tokens"])

    return ask


async def all_choices(server: Server, body: dict[str, Any], tokenizer: Tokenizer) -> Asked:
    """vLLM's server with `n=8`; the client votes over all of them."""
    request = encode("POST", "/v1/chat/completions", body | {"n": K})
    start = perf_counter()
    parsed = (await send(server.address, request)).json()
    contents = [choice["message"]["content"] or "" for choice in parsed["choices"]]
    thoughts = [choice["message"]["reasoning"] or "" for choice in parsed["choices"]]
    winner = await vote(contents, [len(thought) for thought in thoughts])
    wall_s = perf_counter() - start
    answers = sum(tokenizer.answer(content) for content in contents)
    return Asked(contents[winner], wall_s, answers, parsed["usage"]["completion_tokens"])


async def closing(server: Server, body: dict[str, Any], tokenizer: Tokenizer) -> Asked:
    """vLLM's server with `n=8`, streamed; the client closes the stream after 3 finished choices and votes over them."""
    request = encode("POST", "/v1/chat/completions", body | {"n": K, "stream": True})
    contents, thoughts, finished = [""] * K, [""] * K, list[int]()
    start = perf_counter()
    async with opened(server.address, request) as chunks:
        async for chunk in chunks:
            for choice in chunk["choices"]:
                index, delta = choice["index"], choice["delta"]
                contents[index] += delta.get("content") or ""
                thoughts[index] += delta.get("reasoning") or ""
                if choice["finish_reason"]:
                    finished.append(index)
            if len(finished) >= M:
                break
    picked = finished[:M]
    winner = picked[await vote([contents[index] for index in picked], [len(thoughts[index]) for index in picked])]
    wall_s = perf_counter() - start
    return Asked(contents[winner], wall_s, sum(tokenizer.answer(content) for content in contents), None)


ROWS = (
    Row("single", "thinkserve", strategy("single")),
    Row("majority@8", "thinkserve", strategy("majority", k=K)),
    Row("short-1@8", "thinkserve", strategy("short-m-at-k", k=K, m=1)),
    Row("short-3@8", "thinkserve", strategy("short-m-at-k", k=K, m=M)),
    Row("vLLM n=8 + client vote", "vllm", all_choices),
    Row("vLLM n=8, closed after 3", "vllm", closing),
)
DRIFT_ROW = Row(DRIFT, "thinkserve", strategy("majority", k=K))


def schedule(rows: Sequence[Row], problems: int, chunk: int) -> Iterator[tuple[str, Row, range]]:
    """Key, row and problems of every measurement, in the order of measuring: rows take turns, in rotating order."""
    for number, first in enumerate(range(0, problems, chunk)):
        for place in range(len(rows)):
            row = rows[(number + place) % len(rows)]
            yield f"strategies/{row.name}/{first}", row, range(first, min(first + chunk, problems))


async def measure(server: Server, rows: Sequence[Row], problems: Sequence[Problem], work: Work) -> None:
    """Fill the journal with the rows' measurements that it does not hold yet."""
    tokenizer, before = Tokenizer(work.options.model), await settled(server.address)
    for key, row, indices in schedule(rows, len(problems), work.options.chunk):
        if key not in work.journal:
            chunk = {index: problems[index] for index in indices}
            asked = await _ask_all(server, row, chunk, work.options, tokenizer)
            after = await settled(server.address)
            work.journal.put(key, _record(chunk, asked, after - before))
            work.advance()
            before = after


async def _ask_all(
    server: Server, row: Row, problems: Mapping[int, Problem], options: Options, tokenizer: Tokenizer
) -> dict[int, Asked]:
    """What came of each problem; `concurrency` of them are at work at once."""
    asked = dict[int, Asked]()

    async def ask(index: int) -> None:
        asked[index] = await row.ask(server, body(server, problems[index].question, index, options), tokenizer)

    await at_once(options.concurrency, problems, ask)
    return asked


def _record(problems: Mapping[int, Problem], asked: Mapping[int, Asked], counted: int) -> dict[str, Any]:
    """Figures of one chunk: per problem what came of it, and the engine's own count over all of them."""
    mean = counted / len(problems)
    return {
        "samples": [_sample(problem, asked[index], mean) for index, problem in problems.items()],
        "counted": counted,
    }


def _sample(problem: Problem, asked: Asked, mean_count: float) -> dict[str, float]:
    total = mean_count if asked.total is None else asked.total
    right = float(correct(problem, asked.content))
    return {"correct": right, "total": total, "thinking": total - asked.answers, "wall_s": asked.wall_s}


def body(server: Server, question: str, index: int, options: Options) -> dict[str, Any]:
    """The request, the same for both servers: prompt, sampling and seed."""
    return {
        "model": server.model,
        "messages": [{"role": "user", "content": question}],
        "max_completion_tokens": options.max_tokens,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "seed": options.seed * 1_000_003 + index,
    }
