"""A stream on a real socket: only `data:` lines and comments, every chunk complete, and `[DONE]` whatever happens."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from time import monotonic
from typing import Any

import openai
import pytest
from pydantic import TypeAdapter

from thinkserve.server.wire_types import Chunk
from thinkserve.strategies.errors import EngineDead, EngineFailed
from thinkserve.strategies.scripted import byte_tokens
from thinkserve.strategies.testing import ScriptedEngine

Serve = Callable[..., Any]
RACE = {"name": "short-m-at-k", "params": {"k": 4, "m": 2}}


def events(text: str) -> list[dict[str, Any]]:
    """All payloads of a stream; its lines are checked on the way."""
    assert re.fullmatch(r"(?:(?:data: [^\n]+|: [^\n]*)\n\n)*", text)
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    assert "[DONE]" not in lines
    return [json.loads(line) for line in lines]


def chunks(text: str) -> list[dict[str, Any]]:
    """The chunks, each of the published shape."""
    found = events(text)
    for chunk in found:
        TypeAdapter(Chunk).validate_python(chunk)
    return found


def joined(found: list[dict[str, Any]], name: str) -> str:
    """What the client puts together."""
    return "".join(choice["delta"].get(name) or "" for chunk in found for choice in chunk["choices"])


def sdk(server: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=20)


@pytest.mark.parametrize("body", [{}, {"strategy": RACE}, {"strategy": "majority"}, {"include_reasoning": False}])
def test_a_stream_says_what_the_plain_answer_says(serve: Serve, body: dict[str, Any]) -> None:
    """Same thoughts, same content, same usage, whatever the strategy."""
    scripts = ["wäre es 4?\n\nJa</think>\n\nAlso \\boxed{4} 🎉", "hm</think>\\boxed{4}", "nein</think>\\boxed{5}"]
    plain = serve(ScriptedEngine(scripts)).chat(seed=1, **body).json()
    answer = serve(ScriptedEngine(scripts)).chat(seed=1, stream=True, stream_options={"include_usage": True}, **body)
    found = chunks(answer.text)
    message = plain["choices"][0]["message"]
    assert found[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert joined(found, "content") == message["content"]
    assert joined(found, "reasoning") == joined(found, "reasoning_content") == (message["reasoning"] or "")
    assert found[-2]["choices"][0]["finish_reason"] == "stop"
    assert found[-1]["choices"] == []
    assert len({chunk["id"] for chunk in found}) == 1
    for usage in (found[-1]["usage"], plain["usage"]):
        del usage["strategy"]["wall_ms"], usage["strategy"]["ttft_ms"], usage["strategy"]["trace_id"]
    assert found[-1]["usage"] == plain["usage"]


def test_headers_keep_proxies_from_buffering(serve: Serve) -> None:
    """And say what was decided."""
    headers = serve(ScriptedEngine(["t</think>a"])).chat(stream=True, strategy=RACE).headers
    assert headers["content-type"].startswith("text/event-stream")
    assert (headers["cache-control"], headers["x-accel-buffering"]) == ("no-store", "no")
    assert headers["x-reasoning-strategy"].startswith("short-m-at-k; k=4; m=2")
    assert "content-length" not in headers


def test_the_openai_client_reads_it(serve: Serve) -> None:
    """Text, thoughts and usage of a race, through the SDK."""
    server = serve(ScriptedEngine(["2+2</think>4"]))
    stream = sdk(server).chat.completions.create(
        model="m",
        messages=[{"role": "user", "content": "2+2?"}],
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"strategy": RACE},
    )
    content, thoughts, usage = "", "", None
    for chunk in stream:
        for choice in chunk.choices:
            content += choice.delta.content or ""
            thoughts += getattr(choice.delta, "reasoning_content", None) or ""
        usage = chunk.usage or usage
    assert (content, thoughts) == ("4", "2+2")
    assert usage is not None
    assert usage.completion_tokens == server.engine.generated


def test_silence_is_broken_by_comments(serve: Serve) -> None:
    """While chains race nobody hears anything but the keep-alive, which says how far they are."""
    server = serve(ScriptedEngine(["t" * 60 + "</think>a"], tick=0.01), keep_alive_s=0.1)
    text = server.chat(stream=True, strategy=RACE).text
    comments = [line for line in text.split("\n\n") if line.startswith(":")]
    assert 2 <= len(comments) <= 20
    assert re.fullmatch(r": keep-alive 4 chains, \d finished, \d+\.\ds", comments[0])
    assert joined(chunks(text), "content") == "a"


def test_progress_is_sent_to_those_who_ask(serve: Serve) -> None:
    """As ordinary chunks with an empty delta; the text is the same."""
    server = serve(ScriptedEngine(["t" * 80 + "</think>\\boxed{1}"]))
    quiet = chunks(server.chat(stream=True, strategy=RACE).text)
    told = chunks(server.chat(stream=True, strategy=RACE, stream_options={"include_progress": True}).text)
    assert not any("strategy_event" in chunk for chunk in quiet)
    happened = [chunk["strategy_event"] for chunk in told if "strategy_event" in chunk]
    assert {"chain.started", "chain.progress", "winner"} <= {event["type"] for event in happened}
    assert [event["seq"] for event in happened] == list(range(1, len(happened) + 1))
    assert joined(told, "content") == joined(quiet, "content")


def test_without_a_stream_mode_thoughts_are_not_streamed(serve: Serve) -> None:
    """`stream: "none"` shows nobody's thoughts, and the answer as ever."""
    server = serve(ScriptedEngine(["think</think>answer"]))
    found = chunks(server.chat(stream=True, strategy={"name": "single", "stream": "none"}).text)
    assert (joined(found, "reasoning"), joined(found, "content")) == ("", "answer")


def test_logprobs_come_with_the_text_they_belong_to(serve: Serve) -> None:
    """One entry per token of the answer."""
    found = chunks(serve(ScriptedEngine(["t</think>abc"])).chat(stream=True, logprobs=True, top_logprobs=2).text)
    entries = [
        entry
        for chunk in found
        for choice in chunk["choices"]
        for entry in (choice["logprobs"] or {}).get("content", ())
    ]
    assert "".join(entry["token"] for entry in entries) == joined(found, "content") == "abc"
    assert all(len(entry["top_logprobs"]) == 2 for entry in entries)


def test_a_stop_string_ends_answer_and_engine(serve: Serve) -> None:
    """It is not shown, and no token is generated behind it."""
    server = serve(ScriptedEngine(["think STOP</think>one STOP two three four"]))
    found = chunks(server.chat(stream=True, stop="STOP").text)
    assert (joined(found, "content"), joined(found, "reasoning")) == ("one ", "think STOP")
    assert found[-1]["choices"][0]["finish_reason"] == "stop"
    assert server.engine.generated == len("think STOP") + 1 + len("one STOP")


@pytest.mark.parametrize("error", [EngineFailed("lost at 0x7f"), EngineDead("gone")])
def test_an_error_in_mid_stream_is_an_event_and_the_stream_still_ends(serve: Serve, error: EngineFailed) -> None:
    """In the error shape, before `[DONE]`; the SDK raises it."""
    server = serve(ScriptedEngine(["t" * 50], fail={0: (5, error), 1: (5, error)}))
    answer = server.chat(stream=True)
    assert answer.status_code == 200
    found = events(answer.text)
    assert set(found[-1]) == {"error"}
    assert joined(found[:-1], "reasoning") == "ttttt"
    assert "0x" not in answer.text
    with pytest.raises(openai.APIError) as raised:
        for _ in sdk(server).chat.completions.create(
            model="m", messages=[{"role": "user", "content": "x"}], stream=True
        ):
            pass
    assert raised.value.code == found[-1]["error"]["code"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_dead_engine_is_503_before_anything_is_sent(serve: Serve, stream: bool) -> None:
    """With a hint when to come back."""
    server = serve(ScriptedEngine(["a"]))
    server.backend.alive = False
    answer = server.chat(stream=stream)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_unavailable")
    assert int(answer.headers["retry-after"]) > 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_deadline_without_an_answer_is_told(serve: Serve, stream: bool) -> None:
    """504 where there is a status to give; in a stream that has shown thoughts, an answer cut off."""
    server = serve(ScriptedEngine(["t" * 9000], tick=0.005))
    answer = server.chat(stream=stream, strategy={"name": "single", "timeout_s": 0.3})
    if stream:
        last = chunks(answer.text)[-1]
        assert last["choices"][0]["finish_reason"] == "length"
        assert last["strategy"]["stopped_by"] == "deadline"
    else:
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
        assert answer.headers["x-should-retry"] == "false"
    assert server.metric("requests_total", outcome="deadline", strategy="single") == 1
    assert server.metric("requests_total", outcome="error", strategy="none") == 0


def test_a_full_server_says_so_at_once(serve: Serve, until: Callable[..., float]) -> None:
    """503 with Retry-After, while those inside go on; then there is room again."""
    server = serve(ScriptedEngine(["t" * 40 + "</think>a"], tick=0.01), max_inflight=1)
    with ThreadPoolExecutor(1) as pool:
        inside = pool.submit(server.chat)
        until(lambda: len(server.engine.live) == 1)
        started = monotonic()
        answer = server.chat()
        assert monotonic() - started < 0.3
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "overloaded")
        assert 1 <= int(answer.headers["retry-after"]) <= 30
        assert inside.result().status_code == 200
    assert server.chat().status_code == 200
    assert server.metric("admission_rejections_total", reason="inflight") == 1


def test_concurrent_streams_do_not_touch_each_other(serve: Serve) -> None:
    """Twelve answers at once, each its own, byte for byte what it is alone."""

    def echo(job: Any, index: int) -> str:
        asked = re.search(r"user: (\d+)", engine.decode(job.prompt))
        assert asked is not None
        return f"thinking of {asked[1]}</think>" + " ".join([asked[1]] * 10)

    engine = ScriptedEngine(echo, burst=4)
    server = serve(engine)

    def ask(number: int) -> str:
        return joined(chunks(server.chat(str(number), stream=True).text), "content")

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(ask, range(12)))
    assert answers == [" ".join([str(number)] * 10) for number in range(12)]


def test_a_reader_that_stalls_is_given_up_and_the_canary_never_notices(
    serve: Serve, until: Callable[..., float]
) -> None:
    """It holds its chains until the send timeout, not longer; memory does not grow meanwhile."""
    server = serve(ScriptedEngine(lambda job, _: LONG if len(job.prompt) > 50 else "t</think>ok", burst=200))
    server.call(lambda: setattr(server.server.state, "send_timeout_s", 1.0))
    server.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        body = {"model": "m", "stream": True, "messages": [{"role": "user", "content": "long" * 20}]}
        content = json.dumps(body).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n"
        connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + content)
        until(lambda: len(server.engine.live) == 1)
        assert server.chat().json()["choices"][0]["message"]["content"] == "ok"
        assert until(lambda: server.engine.live == [], 15) < 5
    assert server.engine.generated < len(LONG)
    until(lambda: server.metric("client_disconnects_total", phase="answering") == 1)


LONG = byte_tokens("x") * 3_000_000


def test_many_streams_at_once_are_served_by_few_threads(serve: Serve) -> None:
    """A stream is a task, not a thread."""
    server = serve(ScriptedEngine(["t" * 20 + "</think>a"], tick=0.005))
    before = threading.active_count()
    connections = [server.send_chat(stream=True) for _ in range(64)]
    for connection in connections:
        with connection:
            assert b"[DONE]" in b"".join(received(connection))
    assert threading.active_count() - before < 8


def received(connection: socket.socket) -> Iterator[bytes]:
    """What comes until the stream's end."""
    while part := connection.recv(65536):
        yield part
        if b"[DONE]" in part:
            return


@pytest.mark.parametrize("more", [{}, {"logprobs": True, "top_logprobs": 20}])
def test_no_line_is_longer_than_clients_take(serve: Serve, more: dict[str, Any]) -> None:
    """Some read lines of 64 KiB at most, and a race tells all of its winner's thoughts at once."""
    server = serve(ScriptedEngine(["数" * 9000 + "</think>\n\n" + "är " * 400]))

    text = server.chat(stream=True, strategy={"name": "majority", "params": {"k": 2}}, max_tokens=40_000, **more).text

    assert 64 * 1024 > max(map(len, text.encode().split(b"\n")))
    found = chunks(text)
    assert ("数" * 9000, "\n\n" + "är " * 400) == (joined(found, "reasoning"), joined(found, "content"))


def test_a_stream_without_thoughts_says_that_its_time_was_over(serve: Serve) -> None:
    """It has shown nothing, whatever was thought."""
    server = serve(ScriptedEngine(["t" * 20_000], tick=0.005))

    found = events(server.chat(stream=True, strategy={"name": "single", "stream": "none", "timeout_s": 0.3}).text)

    assert "deadline_exceeded" == found[-1]["error"]["code"]
