"""A remote stream: what was scripted is what arrives, anything else is a clear error, and leaving is noticed."""

from __future__ import annotations

import json
import math
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from itertools import cycle
from typing import Any

import anyio
import pytest
from anyio.abc import ByteStream, SocketAttribute, SocketStream

from tests.server.remote_fake import END, STREAM, Asked, FakeVllm, framed
from thinkserve.server.errors import Refused
from thinkserve.server.remote_http import RemoteHttp
from thinkserve.server.remote_model import RemoteModel
from thinkserve.server.remote_tokens import RemoteTokenizer
from thinkserve.server.settings import RemoteSettings
from thinkserve.strategies.engine import Control, Delta, Job, ModelInfo, Sampling, Stream
from thinkserve.strategies.errors import BadOptions, EngineFailed, TooLong, Unsupported
from thinkserve.strategies.testing import SCRIPTED, ScriptedEngine

TEXT = ScriptedEngine([])
INFO = replace(SCRIPTED, name="big", context=1000)
JOB = Job(PROMPT := (5, 6, 7), 100, seed=3)

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def remote(fake: FakeVllm, info: ModelInfo = INFO, **settings: Any) -> AsyncIterator[RemoteModel]:
    """A model behind the fake, not introduced to it."""
    async with fake.running() as url:
        http = RemoteHttp(url, RemoteSettings(**settings), "sesame", "The remote guide")
        try:
            yield RemoteModel(http, info, "guide", RemoteTokenizer(http, info.name), TEXT)
        finally:
            await http.aclose()


async def deltas(model: RemoteModel, job: Job = JOB) -> list[Delta]:
    async with model.engine("req").generate(job) as stream:
        return [delta async for delta in stream]


async def read(stream: Stream, into: list[int]) -> None:
    """All tokens up to the end, or up to the error."""
    async for delta in stream:
        into += delta.tokens


def all_tokens(found: list[Delta]) -> tuple[int, ...]:
    return tuple(token for delta in found for token in delta.tokens)


async def test_a_stream_is_what_the_server_wrote() -> None:
    """Tokens in order, one finish, on the last delta; the server's counts; then nothing more."""
    async with remote(FakeVllm("one two<eos>")) as model, model.engine("req").generate(JOB) as stream:
        found = [delta async for delta in stream]

        assert TEXT.encode("one two<eos>") == all_tokens(found)
        assert [None] * (len(found) - 1) + ["stop"] == [delta.finish for delta in found]
        assert (8, 3) == (stream.generated, stream.cached)
        with pytest.raises(StopAsyncIteration):
            await anext(stream)


async def test_a_job_that_meets_its_limit_ends_by_length() -> None:
    """The limit is the job's, and the context's if that is nearer."""
    async with remote(FakeVllm("t" * 99)) as model:
        short = await deltas(model, Job(PROMPT, 4))
        filled = await deltas(model, Job((5,) * 993, 100))

    assert [(4, "length"), (7, "length")] == [(len(all_tokens(each)), each[-1].finish) for each in (short, filled)]


async def test_alternatives_come_by_id_best_first() -> None:
    """The sampled token is one of them only if it is as probable; minus infinity is itself again."""
    async with remote(FakeVllm([20, 21])) as model:
        found = await deltas(model, Job(PROMPT, 2, logprobs=3))
        alone = await deltas(model, Job(PROMPT, 2, logprobs=0))

    assert [-math.inf, -1.5] == [value for delta in found for value in delta.logprobs]
    assert [((7, -1.0), (8, -2.0), (9, -3.0)), ((7, -1.0), (21, -1.5), (8, -2.0))] == [
        each for delta in found for each in delta.top
    ]
    assert [-math.inf, -1.5] == [value for delta in alone for value in delta.logprobs]
    assert [] == [each for delta in alone for each in delta.top]


async def test_all_of_a_job_is_sent() -> None:
    """No default of the other server comes in; stop texts stay; the salt is sent as a hash, the key as a header."""
    draw = Sampling(0.5, 0.9, 40, 0.1, 0.2, 0.3, 1.1, ((7, math.inf), (8, -2.0)))
    job = Job(PROMPT, 9, draw, 2**63 + 5, thinking_budget=4, stop=("\n\n",), stop_tokens=(9,), logprobs=2)
    fake = FakeVllm()
    async with remote(fake) as model, model.engine("req", "tenant/1").generate(job):
        pass
    body = fake.bodies("/v1/completions")[0]

    assert {
        "model": "big", "prompt": [5, 6, 7], "max_tokens": 9, "temperature": 0.5, "top_p": 0.9, "top_k": 40,
        "min_p": 0.1, "presence_penalty": 0.2, "frequency_penalty": 0.3, "repetition_penalty": 1.1,
        "logit_bias": {"7": 100.0, "8": -2.0}, "seed": 5, "thinking_token_budget": 4, "stop": ["\n\n"],
        "stop_token_ids": [9], "include_stop_str_in_output": True, "skip_special_tokens": False,
        "return_token_ids": True, "return_tokens_as_token_ids": True, "logprobs": 2, "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True}, "request_id": "req-guide-0",
    } == {name: value for name, value in body.items() if name != "cache_salt"}  # fmt: skip
    assert len(body["cache_salt"]) == 32
    assert "tenant" not in body["cache_salt"]
    assert fake.asked[0].headers["authorization"] == "Bearer sesame"


async def test_a_thinking_budget_counts_from_the_tag_in_the_prompt() -> None:
    """The job counts what is still to come; vLLM counts from where thinking was opened."""
    fake = FakeVllm()
    async with remote(fake) as model:
        await deltas(model, Job((5, *INFO.think_open, 6, 7, 8), 9, thinking_budget=4))

    assert fake.bodies("/v1/completions")[0]["thinking_token_budget"] == 7


@pytest.mark.parametrize(
    ("job", "error"),
    [
        (Job(PROMPT, 1, controls=(Control(),)), Unsupported),
        (Job(PROMPT, 1, stats=True), Unsupported),
        (Job((5,) * 1000, 1), TooLong),
        (Job(PROMPT, 1, thinking_budget=-1), BadOptions),
    ],
)
async def test_what_cannot_be_done_elsewhere_is_refused_before_it_is_sent(job: Job, error: type[Exception]) -> None:
    """Controls, statistics, a prompt that fills the context, a budget below zero."""
    fake = FakeVllm()
    async with remote(fake) as model:
        with pytest.raises(error):
            await deltas(model, job)

    assert [] == fake.asked


async def test_one_connection_serves_jobs_that_follow_each_other() -> None:
    """A finished stream gives its connection back."""
    fake = FakeVllm()
    async with remote(fake) as model:
        for _ in range(3):
            await deltas(model)

    assert (1, 0) == (fake.connections, fake.hung_up)


@pytest.mark.parametrize("read", [0, 1, 3])
async def test_leaving_the_block_reaches_the_server(read: int) -> None:
    """Whatever was read until then; `generated` is what had arrived."""
    fake = FakeVllm("t" * 900, pause_s=0.01)
    async with remote(fake) as model:
        async with model.engine("req").generate(Job(PROMPT, 900)) as stream:
            seen = 0
            for _ in range(read):
                seen += len((await anext(stream)).tokens)
        with anyio.fail_after(2):
            while not fake.hung_up:
                await anyio.sleep(0.005)
        assert seen == stream.generated
        with pytest.raises(StopAsyncIteration):
            await anext(stream)


async def test_closing_the_model_ends_its_streams() -> None:
    """With an error, at once."""
    async with remote(FakeVllm("tt", pause_s=60)) as model, model.engine("req").generate(JOB) as stream:
        await anext(stream)
        await model.aclose()
        with pytest.raises(EngineFailed), anyio.fail_after(2):
            await anext(stream)


@pytest.mark.parametrize("useful", [True, False])
async def test_jobs_that_are_left_early_are_successes_to_the_breaker(useful: bool) -> None:
    """Failures with good jobs between them are not failures in a row; what their reader cannot use is no good job."""
    bad = cycle((True, False))

    async def fault(asked: Asked, stream: ByteStream) -> bool:
        return next(bad) and await reset_after(asked, stream, STREAM + framed(chunk()))

    async with remote(FakeVllm("tt", pause_s=60, fault=fault), breaker_failures=2) as model:
        for _ in range(3):
            with pytest.raises(EngineFailed):
                await deltas(model)
            with suppress(EngineFailed):
                async with model.engine("req").generate(JOB) as stream:
                    if (await anext(stream)).tokens and not useful:
                        raise EngineFailed("what it says cannot be read")
        assert useful == model.alive


async def test_a_cancelled_reader_leaves_nothing_open() -> None:
    """Cancelled while it waits for a token that does not come; the connection is closed all the same."""
    fake = FakeVllm("t" * 900, pause_s=60)
    async with remote(fake) as model:
        with anyio.move_on_after(0.1) as scope:
            await deltas(model)
        with anyio.fail_after(2):
            while not fake.hung_up:
                await anyio.sleep(0.005)

    assert scope.cancelled_caught


def broken_at(place: int, line: str | bytes) -> Callable[[Asked, ByteStream], Any]:
    """Writes that many good chunks and then something else, and ends the stream."""

    async def fault(asked: Asked, stream: ByteStream) -> bool:
        if asked.path != "/v1/completions":
            return False
        good = FakeVllm().lines(asked.body, TEXT.encode("t" * 50))[:place]
        await stream.send(STREAM + b"".join(framed(f"data: {each}\n\n") for each in good))
        await stream.send(framed(line) + END)
        return True

    return fault


CHOICE = {"index": 0, "text": "a", "finish_reason": None, "token_ids": [5], "logprobs": None}


LISTED = {"token_logprobs": [-1.0] * 21, "top_logprobs": [{"token_id:7": -1.0}] * 21}


def chunk(**more: object) -> str:
    return "data: " + json.dumps({"choices": [CHOICE | more]}) + "\n\n"


@pytest.mark.parametrize("place", [0, 2])
@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("data: {nope}\n\n", "not JSON"),
        (b'data: {"choices": [{"text": "\xff\xfe"}]}\n\n', "not JSON"),
        ("data: " + "[" * 1500 + "\n\n", "not JSON"),
        ("data: 7\n\n", "not a JSON object"),
        ('data: {"choices": "x"}\n\n', "one choice"),
        (f"data: {json.dumps({'choices': [CHOICE, CHOICE]})}\n\n", "one choice"),
        (chunk(token_ids=None), "token ids"),
        (chunk(token_ids=[5, True]), "vocabulary"),
        (chunk(token_ids=[259]), "vocabulary"),
        (chunk(token_ids=[-1]), "vocabulary"),
        (chunk(token_ids=[5] * 21, logprobs=LISTED), "more tokens than it was asked for"),
        (f"data: {json.dumps({'choices': [], 'usage': {'completion_tokens': 21}})}\n\n", "more tokens than"),
        (chunk(finish_reason=7), "way of its own"),
        (chunk(finish_reason="abort", token_ids=[]), "gave up on the request (abort)"),
        (chunk(), "log-probability"),
        (chunk(logprobs={"token_logprobs": [], "top_logprobs": []}), "log-probability"),
        (chunk(logprobs={"token_logprobs": [None], "top_logprobs": [{}]}), "no log-probability"),
        (chunk(logprobs={"token_logprobs": [-1.0], "top_logprobs": [None]}), "alternatives"),
        (chunk(logprobs={"token_logprobs": [-1.0], "top_logprobs": [{" the": -1.0}]}), "by its text"),
        ("data: " + "x" * 3000 + "\n\n", "a line of more than 2000 bytes"),
        ("x" * 3000, "a line of more than 2000 bytes"),
        (": nothing\n\n" * 2000, "more than 20000 bytes"),
        ("data: [DONE]\n\n", "before its end"),
        ("<html>hello</html>\n", "before its end"),
        ('data: {"error": {"message": "EngineCore died, key sesame", "code": 500}}\n\n', "EngineCore died, key ***"),
        ('data: {"error": "gone"}\n\n', "gone"),
    ],
)
async def test_what_vllm_does_not_send_ends_the_job_with_a_clear_error(
    place: int, line: str | bytes, words: str
) -> None:
    """At the beginning and after good tokens, which still count; one line, that names the model and not the key."""
    fake = FakeVllm(fault=broken_at(place, line))
    async with remote(fake, max_line_bytes=2000, max_stream_bytes=20000) as model:
        seen = list[int]()
        async with model.engine("req").generate(replace(JOB, logprobs=1, max_tokens=20)) as stream:
            with pytest.raises(EngineFailed) as caught:
                await read(stream, seen)

    assert str(caught.value).startswith("The remote guide ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "sesame" not in str(caught.value)
    assert place == len(seen) == stream.generated
    assert 1 == len(fake.bodies("/v1/completions"))


@pytest.mark.parametrize("place", [0, 2])
async def test_a_refusal_inside_a_stream_is_one(place: int) -> None:
    """vLLM begins to answer before it has looked at everything; nothing is wrong with the server."""
    line = 'data: {"error": {"message": "logprobs of 99, sesame", "type": "BadRequestError", "code": 400}}\n\n'
    async with remote(FakeVllm(fault=broken_at(place, line)), breaker_failures=1) as model:
        with pytest.raises(Refused) as caught:
            await deltas(model)

        assert "The remote guide refuses the request (400): logprobs of 99, ***" == str(caught.value)
        assert model.alive


async def reset_after(asked: Asked, stream: ByteStream, sent: bytes) -> bool:
    """Resets the connection, as a crashed server's kernel does."""
    if sent:
        await stream.send(sent)
        await anyio.sleep(0.05)
    assert isinstance(stream, SocketStream)
    raw: socket.socket = stream.extra_attributes[SocketAttribute.raw_socket]()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    await stream.aclose()
    return True


async def test_a_reset_after_the_first_token_is_an_error_and_is_not_retried() -> None:
    """The tokens that came are given first; asking again would write them twice."""

    async def fault(asked: Asked, stream: ByteStream) -> bool:
        return await reset_after(asked, stream, STREAM + framed(chunk()))

    fake, seen = FakeVllm(fault=fault), list[int]()
    async with remote(fake) as model:
        async with model.engine("req").generate(JOB) as stream:
            with pytest.raises(EngineFailed, match="broke off"):
                await read(stream, seen)

        assert ([5], 1) == (seen, stream.generated)
    assert 1 == len(fake.asked)


async def test_a_reset_before_the_first_byte_is_tried_again() -> None:
    """Nobody has seen a token of the first attempt."""
    calls = 0

    async def fault(asked: Asked, stream: ByteStream) -> bool:
        nonlocal calls
        calls += 1
        return calls == 1 and await reset_after(asked, stream, b"")

    async with remote(FakeVllm(fault=fault)) as model:
        found = await deltas(model)

    assert (2, "stop") == (calls, found[-1].finish)


async def test_a_server_that_falls_silent_is_given_up() -> None:
    """After the read timeout; before and after tokens have come."""
    async with remote(FakeVllm("tt", pause_s=60), read_timeout_s=0.1) as model:
        with pytest.raises(EngineFailed, match="silent"), anyio.fail_after(5):
            await deltas(model)


async def test_a_stream_cut_off_after_its_finish_is_whole() -> None:
    """The usage is missing, not a token."""

    async def fault(asked: Asked, stream: ByteStream) -> bool:
        return await reset_after(asked, stream, STREAM + framed(chunk(finish_reason="stop")))

    async with remote(FakeVllm(fault=fault)) as model:
        found = await deltas(model)

    assert [((5,), "stop")] == [(delta.tokens, delta.finish) for delta in found]


async def never_ending(asked: Asked, stream: ByteStream) -> bool:
    """Sends the last token, and never the end of the stream."""
    await stream.send(STREAM + framed(chunk(finish_reason="length")))
    await anyio.sleep(30)
    return True


async def test_a_server_that_never_ends_a_finished_stream_is_not_waited_for() -> None:
    """A second at most; the connection is not used again."""
    async with remote(FakeVllm(fault=never_ending)) as model:
        with anyio.fail_after(3):
            found = await deltas(model)

    assert "length" == found[-1].finish


async def test_a_reader_that_is_cancelled_can_take_what_had_arrived() -> None:
    """With the end, if that had come; and once."""
    async with remote(FakeVllm(fault=never_ending)) as model, model.engine("req").generate(JOB) as stream:
        with anyio.move_on_after(0.3):
            await anext(stream)
        taken = stream.unread()

    assert ((5,), "length", ()) == (taken.tokens, taken.finish, stream.unread().tokens)


async def test_a_chain_goes_on_where_it_was(anyio_backend: str) -> None:
    """By resubmission: the second segment's prompt holds what the first one read, and what was injected."""
    fake = FakeVllm("tt")
    async with remote(fake) as model, model.engine("req").chain(Job(PROMPT, 100)) as chain:
        for _ in range(2):
            async with chain.segment(2) as stream:
                assert 2 == sum([len(delta.tokens) async for delta in stream])
            chain.inject((9,))
    prompts = [body["prompt"] for body in fake.bodies("/v1/completions")]

    assert [[5, 6, 7], [5, 6, 7, *TEXT.encode("tt"), 9]] == prompts
