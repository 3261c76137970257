"""Strategies that ask a verifier on another server, whose tokenizer only that server knows."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from anyio.abc import ByteStream

from tests.server.remote_fake import Asked, FakeVllm, told
from thinkserve.server.errors import RoleDown, RoleFailed, from_exception
from thinkserve.server.model_dir import StartError
from thinkserve.server.remote_engine import connect
from thinkserve.server.roles import Roles
from thinkserve.server.settings import RemoteSettings
from thinkserve.server.testing import ScriptedBackend
from thinkserve.strategies.engine import Engine, Job, Task, Tokens
from thinkserve.strategies.errors import Unforgiven
from thinkserve.strategies.testing import ScriptedEngine, play
from thinkserve.strategies.verifier import ALTERNATIVES

pytestmark = pytest.mark.anyio
PROMPT = "q<think>"


def shifted(text: str) -> Tokens:
    """Another tokenizer: a digit is another token than in the target's."""
    return tuple(token + (51 <= token <= 60) for token in ScriptedEngine([]).encode(text))


class Opinionated(FakeVllm):
    """A verifier whose likeliest word, the token 7, is the one given; 8 is the opposite."""

    def __init__(self, word: str, **more: Any) -> None:
        words = {7: word, 8: "No" if word == "Yes" else "Yes"}

        async def answers(asked: Asked, stream: ByteStream) -> bool:
            if asked.path != "/detokenize":
                return False
            await stream.send(told({"prompt": words.get(asked.body["tokens"][0], "?")}))
            return True

        super().__init__([20], encode=shifted, fault=answers, **more)


@asynccontextmanager
async def asking(fake: FakeVllm, target: ScriptedEngine, **settings: Any) -> AsyncIterator[Engine]:
    """The engine of a request whose verifier is the fake."""
    backend = ScriptedBackend(target)
    async with fake.running() as url:
        verifier = await connect(url, RemoteSettings(**settings), backend, "verifier")
        try:
            assert verifier.text is None
            yield Roles(backend, {"verifier": verifier}).engine("req")
        finally:
            await verifier.aclose()


def questions(fake: FakeVllm) -> list[str]:
    """What the verifier was asked."""
    return [body["messages"][0]["content"] for body in fake.bodies("/tokenize") if "messages" in body]


CHAT = [{"role": "user", "content": "yes?"}]
THOUGHT = "Wait, once more from the very start of it. Now then.\n\nSo the answer is 7.\n\n"


@pytest.mark.parametrize("policy", ["continue", "fail"])
async def test_trimr_needs_no_tokenizer_of_its_verifier(policy: str) -> None:
    """Excerpts are cut in the target's tokens; three results that agree end the thinking under either policy."""
    fake, engine = Opinionated("Yes"), ScriptedEngine([THOUGHT * 9 + "</think>It is 7."])
    options = {"underthinking": False, "excerpt_tokens": 11, "mild_room": 20, "on_verifier_error": policy}
    async with asking(fake, engine) as asked:
        task = Task(engine.encode(PROMPT), 2000, question="3 + 4?")
        answer, out = await play("trimr", asked, task, **options)

    assert () == answer.warnings
    rules = [event.data["rule"] for event in out.events if event.type == "budget.forced"]
    assert {"overthinking"} == set(rules)
    assert "Question: 3 + 4?\nExcerpt: nswer is 7.\nDoes" in questions(fake)[0]
    assert any("Second excerpt: nswer is 7." in question for question in questions(fake))


async def test_rap_needs_no_tokenizer_of_its_verifier() -> None:
    """Its questions are whole texts; every step is found useful."""
    fake, engine = Opinionated("Yes"), ScriptedEngine(["one.\n\nso 7", "two.\n\nso 7"])
    async with asking(fake, engine) as asked:
        task = Task(engine.encode("q<think></think>"), 200, phase="answer", question="3 + 4?")
        answer, out = await play("rap", asked, task, samples=2, iterations=1)

    assert () == answer.warnings
    rewards = [event.data["reward"] for event in out.events if event.type == "node.scored"]
    # Log-odds of 1 and half of the samples, weighed alike.
    assert pytest.approx((0.731 * 0.5) ** 0.5, abs=1e-3) == rewards[0]
    assert all("Is the next step useful?" in question for question in questions(fake))


async def test_a_verifier_that_refuses_leaves_rap_a_step_undecided(caplog: pytest.LogCaptureFixture) -> None:
    """A 400 of its server is no reason to end the search; its words are for the log, once."""
    fake, engine = Opinionated("Yes"), ScriptedEngine(["one.\n\nso 7"])
    async with asking(fake, engine) as asked:
        answers, body = fake.fault, {"error": {"message": "no logprobs here", "code": 400}}

        async def refuses(asked: Asked, stream: ByteStream) -> bool:
            if asked.path != "/v1/completions":
                return await answers(asked, stream)
            await stream.send(told(body, 400))
            return True

        fake.fault = refuses
        task = Task(engine.encode("q<think></think>"), 200, phase="answer")
        answer, _ = await play("rap", asked, task, samples=2, iterations=1)

    assert "stop" == answer.finish
    assert (f"a step was not judged: {RoleFailed('verifier')}",) == answer.warnings
    told_once = "request req: the model of the role verifier failed: The remote verifier refuses the request (400): "
    assert [told_once + "no logprobs here"] == [each.message for each in caplog.records]


@pytest.mark.parametrize("policy", ["continue", "fail"])
@pytest.mark.parametrize("status", [400, 500])
async def test_a_verifier_that_cannot_even_tokenize_has_failed_as_such(status: int, policy: str) -> None:
    """By the role's own error, whatever its server says, and whoever else it may be asked by."""
    fake, engine = Opinionated("Yes"), ScriptedEngine([THOUGHT * 9 + "</think>It is 7."])
    async with asking(fake, engine, retries=0) as asked:

        async def fails(asked: Asked, stream: ByteStream) -> bool:
            await stream.send(told({"error": {"message": "cuda in /srv"}}, status))
            return True

        fake.fault = fails
        task = Task(engine.encode(PROMPT), 2000, question="3 + 4?")
        playing = play("trimr", asked, task, underthinking=False, excerpt_tokens=11, on_verifier_error=policy)
        if policy == "fail":
            with pytest.raises(Unforgiven) as caught:
                await playing
            assert isinstance(caught.value.failure, RoleFailed)
            error = from_exception(caught.value, "req")
            assert (502, "verifier_failed") == (error.status, error.code)
        else:
            answer, _ = await playing
            assert (f"the verifier failed: {RoleFailed('verifier')}",) == answer.warnings


async def test_a_server_that_gives_too_few_alternatives_is_found_out_at_the_start() -> None:
    """As many are asked for as will be, and of no other role."""

    async def at_most_five(asked: Asked, stream: ByteStream) -> bool:
        if asked.path != "/v1/completions" or asked.body.get("logprobs", 0) <= 5:
            return False
        message = f"Requested sample logprobs of {ALTERNATIVES}, which is greater than max allowed: 5"
        await stream.send(told({"error": {"message": message, "code": 400}}, 400))
        return True

    target = ScriptedBackend(ScriptedEngine([]))
    async with FakeVllm(fault=at_most_five).running() as url:
        with pytest.raises(StartError, match="max allowed: 5"):
            await connect(url, RemoteSettings(), target, "verifier")
        guide = await connect(url, RemoteSettings(), target, "guide")
        await guide.aclose()


async def test_a_verifier_that_tokenizes_and_does_nothing_else_is_left_alone_in_the_end() -> None:
    """Its engine is stuck, its tokenizer is not: what is wanted is the answer."""
    fake, engine = Opinionated("Yes"), ScriptedEngine([THOUGHT * 60 + "</think>It is 7."])
    async with asking(fake, engine, retries=0, breaker_failures=3) as asked:

        async def stuck(asked: Asked, stream: ByteStream) -> bool:
            if asked.path != "/v1/completions":
                return False
            await stream.send(told({"error": {"message": "stuck"}}, 500))
            return True

        fake.fault = stuck
        fake.asked.clear()
        for _ in range(20):
            with pytest.raises((RoleFailed, RoleDown)):
                async with asked.generate(Job(await asked.render(CHAT, "verifier"), 1, role="verifier")) as stream:
                    [delta async for delta in stream]

    assert 3 == len(fake.bodies("/v1/completions"))
