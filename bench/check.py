"""No speed without being right: greedy answers of both servers on the same questions must be the same text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.client import post
from bench.harness import Journal
from bench.servers import Server
from bench.tasks import Problem

QUESTIONS = 5
MAX_TOKENS = 256


def key(server: str) -> str:
    """Where the journal keeps a server's greedy answers."""
    return f"check/{server}"


async def measure(server: Server, name: str, problems: Sequence[Problem], journal: Journal) -> None:
    """Record the greedy answers, thinking included."""
    if key(name) not in journal:
        journal.put(key(name), [await _greedy(server, problem.question) for problem in problems[:QUESTIONS]])


async def _greedy(server: Server, question: str) -> str:
    messages = [{"role": "user", "content": question}]
    body = {"model": server.model, "messages": messages, "max_completion_tokens": MAX_TOKENS, "temperature": 0}
    message: dict[str, Any] = (await post(server.address, "/v1/chat/completions", body)).json()["choices"][0]["message"]
    return f"{(message['reasoning'] or '').strip()}\n\n{(message['content'] or '').strip()}".strip()


def equal(journal: Journal) -> tuple[int, int] | None:
    """How many answers are equal, of how many; None until both servers were asked."""
    if key("thinkserve") not in journal or key("vllm") not in journal:
        return None
    pairs = list(zip(journal[key("thinkserve")], journal[key("vllm")], strict=True))
    return sum(ours == theirs for ours, theirs in pairs), len(pairs)
