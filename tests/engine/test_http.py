"""The whole way: OpenAI's client, a real socket, our server, real vLLM with the embedded model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from time import monotonic, sleep
from typing import Any

import httpx
import openai
import pytest
from anyio.from_thread import BlockingPortal

from thinkserve.server.lifecycle import Server, reserve_socket
from thinkserve.server.settings import Settings
from thinkserve.server.vllm_engine import VllmBackend

QUESTION: Any = [{"role": "user", "content": "Start with 17. Add 25. Multiply by 3. What is the result?"}]


class Kept:
    """The session's backend, which must outlive the server of these tests."""

    def __init__(self, backend: VllmBackend) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    async def aclose(self) -> None:
        """The session closes the backend itself."""


@pytest.fixture(scope="module")
def url(backend: VllmBackend, portal: BlockingPortal) -> Iterator[str]:
    """A server on the engine, on the engine's own event loop."""
    listener = reserve_socket("127.0.0.1", 0)
    ready = threading.Event()
    kept: Any = Kept(backend)
    server = portal.call(Server, Settings(served_name="arith-small"), kept, listener)
    done = portal.start_task_soon(server.run, ready.set)
    assert ready.wait(20)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    portal.call(server.stop)
    assert done.result(20) == 0


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    """The official client, as anybody would make it."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def settle(backend: VllmBackend) -> float:
    """Seconds until the engine has nothing left to do."""
    begin = monotonic()
    while backend.unfinished:
        assert monotonic() - begin < 5
        sleep(0.002)
    return monotonic() - begin


@pytest.mark.parametrize("strategy", ["single", "majority", "short-m-at-k"])
def test_usage_is_what_the_engine_counted(
    client: openai.OpenAI, backend: VllmBackend, counted: Callable[[], int], strategy: str
) -> None:
    """Every token of every chain, in flight at an abort included: equal to vLLM's own counter, time after time."""
    for seed in range(4):
        before = counted()
        reply = client.chat.completions.create(
            model="arith-small", messages=QUESTION, seed=seed, extra_body={"strategy": strategy}
        )
        settle(backend)
        assert reply.usage is not None
        assert reply.usage.completion_tokens == counted() - before
        assert reply.usage.prompt_tokens > 10
        cost = reply.usage.strategy  # type: ignore[attr-defined]
        assert cost["winner_completion_tokens"] + cost["wasted_tokens"] == reply.usage.completion_tokens
        assert cost["chains"]["finished"] + cost["chains"]["aborted"] == cost["chains"]["started"]


def test_a_stream_says_what_the_plain_answer_says(client: openai.OpenAI) -> None:
    """Greedy, so both are the same chain: thoughts, answer, usage and end."""
    plain = client.chat.completions.create(model="arith-small", messages=QUESTION, temperature=0)
    stream = client.chat.completions.create(
        model="arith-small", messages=QUESTION, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    thoughts, content, usage, finish = "", "", None, None
    for chunk in stream:
        for choice in chunk.choices:
            content += choice.delta.content or ""
            thoughts += getattr(choice.delta, "reasoning_content", None) or ""
            finish = choice.finish_reason or finish
        usage = chunk.usage or usage
    message = plain.choices[0].message
    assert message.content == content
    assert message.reasoning == thoughts  # type: ignore[attr-defined]
    assert "boxed{" in content
    assert plain.choices[0].finish_reason == finish
    assert usage is not None
    assert plain.usage is not None
    assert plain.usage.completion_tokens == usage.completion_tokens


def test_a_race_stops_the_chains_it_does_not_need(client: openai.OpenAI, backend: VllmBackend) -> None:
    """Three of eight finish and vote; the others are cut off and still on the bill."""
    reply = client.chat.completions.create(model="arith-small:race", messages=QUESTION, seed=1)
    report = reply.model_extra["strategy"] if reply.model_extra else {}
    assert report["stopped_by"] == "m_reached"
    assert sum(report["decision"]["votes"].values()) <= 3
    assert reply.usage is not None
    chains = reply.usage.strategy["chains"]  # type: ignore[attr-defined]
    assert chains["started"] == 8
    assert chains["aborted"] >= 1
    assert settle(backend) < 0.5


def leave(http: httpx.Client, url: str, body: dict[str, Any]) -> None:
    """Ask, and hang up at the first silence of the server."""
    with http.stream("POST", url, json=body) as response:
        for _ in response.iter_raw():
            assert body["stream"], "the answer came too early for this test"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_takes_its_chains_with_it(url: str, backend: VllmBackend, stream: bool) -> None:
    """Within half a second nothing of the request is left in the engine, in both modes."""
    vote = {"name": "majority", "params": {"k": 32}}
    body = {"model": "arith-small", "messages": QUESTION, "stream": stream, "strategy": vote}
    with httpx.Client(timeout=httpx.Timeout(10, read=0.15)) as http, pytest.raises(httpx.ReadTimeout):
        leave(http, f"{url}/v1/chat/completions", body)
    assert settle(backend) < 0.5


def test_a_thinking_budget_ends_the_thoughts(client: openai.OpenAI) -> None:
    """The engine closes the think block; the answer comes all the same, and is short."""
    reply = client.chat.completions.create(
        model="arith-small", messages=QUESTION, temperature=0, extra_body={"thinking_token_budget": 8}
    )
    assert "boxed{" in (reply.choices[0].message.content or "")
    assert reply.usage is not None
    assert reply.usage.completion_tokens < 40


def test_a_prompt_beyond_the_context_is_the_clients_mistake(client: openai.OpenAI) -> None:
    """400 with both numbers, and nothing was generated."""
    with pytest.raises(openai.BadRequestError, match=r"tokens; the model's context is 4096") as caught:
        client.chat.completions.create(model="arith-small", messages=[{"role": "user", "content": "7 " * 9000}])
    assert caught.value.code == "context_length_exceeded"


def test_the_same_seed_gives_the_same_answer(client: openai.OpenAI) -> None:
    """Chains draw from their own seeds, whatever else is in the batch."""
    ask = {"model": "arith-small", "messages": QUESTION, "seed": 11, "extra_body": {"strategy": "majority"}}
    first, again = (client.chat.completions.create(**ask) for _ in range(2))
    assert first.choices[0].message == again.choices[0].message
    assert first.usage.completion_tokens == again.usage.completion_tokens


def test_the_models_and_their_presets_can_be_listed(client: openai.OpenAI) -> None:
    """As model pickers do."""
    names = [model.id for model in client.models.list()]
    assert names[0] == "arith-small"
    assert "arith-small:race" in names
