"""Introducing a remote model: what must be there, one line for what is not, and an Engine for what is."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import anyio
import pytest
from anyio.abc import ByteStream

from tests.server.remote_fake import Asked, FakeVllm, card, reply, told
from thinkserve.server.model_dir import StartError
from thinkserve.server.remote_engine import connect
from thinkserve.server.remote_model import RemoteModel
from thinkserve.server.settings import RemoteSettings
from thinkserve.server.testing import ScriptedBackend
from thinkserve.strategies.engine import Job, Path, Role, Tokens
from thinkserve.strategies.errors import EngineDead, EngineFailed, TooLong, Unsupported
from thinkserve.strategies.testing import SCRIPTED, ScriptedEngine
from thinkserve.strategies.verifier import ALTERNATIVES

pytestmark = pytest.mark.anyio

TARGET = ScriptedBackend(ScriptedEngine([]))
QUESTION = [{"role": "user", "content": "why?"}]


def shifted(text: str) -> Tokens:
    """Another tokenizer: a digit is another token than in the target's."""
    return tuple(token + (51 <= token <= 60) for token in TARGET.scripted.encode(text))


@asynccontextmanager
async def connected(
    fake: FakeVllm, role: Role = "guide", target: ScriptedBackend | None = TARGET, **settings: Any
) -> AsyncIterator[RemoteModel]:
    """The fake's model, introduced."""
    async with fake.running() as url:
        model = await connect(url, RemoteSettings(**settings), target, role)
        try:
            yield model
        finally:
            await model.aclose()


async def refusal(fake: FakeVllm, role: Role = "guide", **settings: Any) -> str:
    """Why a server is not used."""
    async with fake.running() as url:
        with pytest.raises(StartError) as caught:
            await connect(url, RemoteSettings(**settings), TARGET, role)
    message = str(caught.value).replace(url, "URL")
    assert "\n" not in message
    assert message.endswith(f"({role}: URL)")
    return message


async def test_a_guide_with_the_targets_tokenizer_is_like_the_target() -> None:
    """Name and context are its own; text is tokenized by the target's tokenizer, without asking its server."""
    fake = FakeVllm()
    async with connected(fake) as model:
        engine, asked = model.engine("req"), len(fake.asked)

        assert replace(SCRIPTED, name="big", context=1000) == model.info == engine.info("guide")
        assert TARGET.scripted.encode("abc") == engine.encode("abc", "guide")
        assert "abc" == engine.decode(engine.encode("abc"))
        assert "abc" == engine.detokenizer("guide").push(engine.encode("abc"))
        assert (True, 0) == (model.alive, model.kv_tokens)
        assert asked == len(fake.asked)


async def test_it_writes_for_whoever_asks() -> None:
    """The role that the job names is not looked at: there is one model here."""
    job = Job((5,), 9, role="verifier")
    async with connected(FakeVllm("yes<eos>"), "verifier") as model, model.engine("req").generate(job) as stream:
        tokens = tuple([token async for delta in stream for token in delta.tokens])

    assert TARGET.scripted.encode("yes<eos>") == tokens


async def test_a_guide_with_another_tokenizer_is_refused_with_the_first_difference() -> None:
    """The text, the place and both ids."""
    message = await refusal(FakeVllm(encode=shifted))

    assert "The remote guide cannot be used: its tokenizer is not the target's: " in message
    assert "in '<extra_0>', token 7 (after '<extra_') is 51 in the target and 52 there" in message


async def test_a_guide_that_leaves_tokens_out_is_refused() -> None:
    """A difference in length is one, too."""
    message = await refusal(FakeVllm(encode=lambda text: TARGET.scripted.encode(text)[:20]))

    assert "in the target and nothing there" in message


@pytest.mark.parametrize("role", ["verifier", "reward"])
async def test_other_models_may_have_a_tokenizer_of_their_own(role: Role) -> None:
    """Their chats are made by their server; plain text cannot be tokenized here, and the error says so."""
    fake = FakeVllm(encode=shifted)
    async with connected(fake, role, reward_format="thinkserve") as model:
        engine = model.engine("req")

        assert (0, ()) == (model.info.vocab_size, model.info.eos)
        for call in (lambda: engine.encode("a"), lambda: engine.decode((5,)), engine.detokenizer):
            with pytest.raises(Unsupported, match="tokenizer of its own"):
                call()
        assert shifted("user: why?\n<think>\n\n</think>\n\n") == await engine.render(QUESTION)


async def test_the_words_of_a_verifiers_alternatives_can_be_read() -> None:
    """Whatever its tokenizer: its server is asked once for each, at a question with one token for an answer."""
    fake = FakeVllm([30], encode=shifted)
    async with connected(fake, "verifier") as model:
        engine = model.engine("req")
        for _ in range(2):
            async with engine.generate(Job((5,), 1, logprobs=3)) as stream:
                [*_, last] = [delta async for delta in stream]

        assert ["<7>", "<8>", "<9>"] == [engine.decode((token,)) for token, _ in last.top[0]]
        for unknown in ((40,), (7, 8)):
            with pytest.raises(Unsupported):
                engine.decode(unknown)
    assert [*range(7, 7 + ALTERNATIVES)] == sorted(body["tokens"][0] for body in fake.bodies("/detokenize"))


async def test_without_a_target_nothing_is_compared() -> None:
    """The tags are then what its own server makes of the texts in the settings."""
    async with connected(FakeVllm(), target=None) as model:
        assert (SCRIPTED.think_open, SCRIPTED.think_close) == (model.info.think_open, model.info.think_close)
    async with connected(FakeVllm(), target=None, reasoning_open="[think]") as model:
        assert not model.info.reasons


@pytest.mark.parametrize("switch", [True, False])
async def test_a_chat_ends_with_closed_thinking_whatever_the_template_knows(switch: bool) -> None:
    """By the template's own switch, or else by the tags behind what it wrote."""
    async with connected(FakeVllm(switch=switch)) as model:
        tokens = await model.engine("req").render(QUESTION)

    assert TARGET.scripted.encode("user: why?\n<think>\n" + ("\n" if switch else "") + "</think>\n\n") == tokens


async def test_a_chat_that_fills_the_context_is_too_long() -> None:
    """As it would be in process."""
    async with connected(FakeVllm()) as model:
        with pytest.raises(TooLong):
            await model.engine("req").render([{"role": "user", "content": "w" * 999}])


async def test_a_server_that_cannot_force_the_end_of_thinking_takes_no_budget() -> None:
    """vLLM without a reasoning parser refuses, other servers ignore it; both are found out at the start."""

    async def ignoring(asked: Asked, stream: ByteStream) -> bool:
        if asked.body and asked.path == "/v1/completions":
            asked.body.pop("thinking_token_budget", None)
        return False

    for fake in (FakeVllm(budgets=False), FakeVllm(fault=ignoring)):
        async with connected(fake) as model:
            with pytest.raises(Unsupported, match="reasoning parser"):
                model.engine("req").generate(Job((5,), 9, thinking_budget=4))
            async with model.engine("req").generate(Job((5,), 9)) as stream:
                assert "stop" == [delta.finish async for delta in stream][-1]


@pytest.mark.parametrize(
    ("cards", "asked", "words"),
    [
        ([], None, "serves 0 models"),
        ([card("a"), card("b")], None, "serves 2 models, say which one: a, b"),
        ([card("a"), card("b")], "c", "does not serve 'c' but a, b"),
        ([card(context=None)], None, "context"),
        ([card(context=True)], None, "context"),
    ],
)
async def test_the_one_model_to_use_must_be_clear(cards: list[Any], asked: str | None, words: str) -> None:
    """Neither none nor several, and its context must be told."""
    assert words in await refusal(FakeVllm(models=cards), model=asked)


async def test_a_model_is_chosen_by_name_and_an_adapter_only_so() -> None:
    """An adapter has its base's context."""
    cards = [card("base"), card("lora", None, parent="base")]
    async with connected(FakeVllm(models=cards)) as model:
        assert "base" == model.info.name
    async with connected(FakeVllm(models=cards), model="lora") as model:
        assert ("lora", 1000) == (model.info.name, model.info.context)


@pytest.mark.parametrize("path", ["/v1/models", "/tokenize", "/v1/completions"])
@pytest.mark.parametrize("answer", [told({"detail": "Not Found"}, 404), reply(b"<html>"), told({"data": None})])
async def test_a_server_that_is_no_vllm_is_refused(path: str, answer: bytes) -> None:
    """A route is missing, or answers something else."""

    async def fault(asked: Asked, stream: ByteStream) -> bool:
        if asked.path == path:
            await stream.send(answer)
        return asked.path == path

    await refusal(FakeVllm(fault=fault))


async def test_a_server_that_is_not_there_is_named() -> None:
    """One line with the address."""
    async with FakeVllm().running() as url:
        pass
    with pytest.raises(StartError, match=f"^The remote guide cannot be reached. .guide: {url}.$"):
        await connect(url, RemoteSettings(retries=0), TARGET, "guide")


@pytest.mark.parametrize(
    "url",
    [
        "big.example",
        "ftp://a",
        "http://",
        "http://me@a",
        "http://a?key=1",
        "http://a:x",
        "http://a:0#b",
        "http://[a",
    ],
)
async def test_an_address_that_is_none_is_refused(url: str) -> None:
    """Nothing is sent; a password in an address would end up in messages."""
    with pytest.raises(StartError, match=r"^guide: not the address of a server") as caught:
        await connect(url, RemoteSettings(), TARGET, "guide")

    assert "pw" not in str(caught.value)


@pytest.mark.parametrize("path", ["", "/", "/v1", "/v1/"])
async def test_an_address_may_end_as_openai_clients_want_it(path: str) -> None:
    """With or without /v1."""
    async with FakeVllm().running() as url:
        model = await connect(url + path, RemoteSettings(), TARGET, "guide")
        await model.aclose()


async def test_the_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the variable that is named; one that is not there, or would break a header, is refused by name."""
    monkeypatch.setenv("GUIDE_KEY", "sesame")
    fake = FakeVllm()
    async with connected(fake, key_env="GUIDE_KEY"):
        pass

    assert {"Bearer sesame"} == {asked.headers["authorization"] for asked in fake.asked}
    for value in ("", "se\nsame", "sésame"):
        monkeypatch.setenv("GUIDE_KEY", value)
        with pytest.raises(StartError, match="GUIDE_KEY holds no usable key") as caught:
            await connect("http://127.0.0.1:9", RemoteSettings(key_env="GUIDE_KEY"), TARGET, "guide")
        assert "same" not in str(caught.value)


async def test_a_check_says_whether_a_call_would_go_out() -> None:
    """Not while the breaker is open, nor after closing; it asks the server nothing."""
    well = True

    async def fault(asked: Asked, stream: ByteStream) -> bool:
        if not well:
            await stream.send(reply(b"", 500))
        return not well

    async with connected(FakeVllm(fault=fault), breaker_failures=2, breaker_cooldown_s=0.1) as model:
        well = False
        for _ in range(2):
            await model.check()
            with pytest.raises(EngineFailed):
                await model.engine("req").render(QUESTION)
        assert not model.alive
        with pytest.raises(EngineDead, match="left alone"):
            await model.check()
        await anyio.sleep(0.15)
        await model.check()
        await model.aclose()
        with pytest.raises(EngineDead, match="closed"):
            await model.check()


async def test_a_model_that_writes_does_not_rate() -> None:
    """The role of the reward model is another one."""
    async with connected(FakeVllm()) as model:
        with pytest.raises(Unsupported, match="does not rate"):
            await model.engine("req").score("q", [Path(("a",))])


async def test_a_start_that_is_cancelled_leaves_no_connection() -> None:
    """The server is still being asked to write when the start is given up."""
    fake = FakeVllm("t" * 9, pause_s=60)
    async with fake.running() as url:
        async with anyio.create_task_group() as group:
            group.start_soon(connect, url, RemoteSettings(), TARGET, "guide")
            while not fake.bodies("/v1/completions"):
                await anyio.sleep(0.01)
            group.cancel_scope.cancel()
        with anyio.fail_after(2):
            while not fake.hung_up:
                await anyio.sleep(0.01)
