"""A remote reward model: paths go out as the format wants them; each step gets the reward that stands at its end."""

from __future__ import annotations

import math
from base64 import b64encode
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from struct import pack
from typing import Any

import pytest
from anyio.abc import ByteStream

from tests.server.remote_fake import Asked, FakeVllm, card, told
from thinkserve.server.model_dir import StartError
from thinkserve.server.remote_engine import connect
from thinkserve.server.remote_model import RemoteModel
from thinkserve.server.remote_reward import Memory, named_format
from thinkserve.server.reward_formats import sigmoid
from thinkserve.server.settings import RemoteSettings
from thinkserve.server.testing import ScriptedBackend
from thinkserve.strategies.engine import Job, Path, Tokens
from thinkserve.strategies.errors import EngineFailed, Unsupported
from thinkserve.strategies.testing import ScriptedEngine

pytestmark = pytest.mark.anyio

TARGET = ScriptedBackend(ScriptedEngine([]))
ENCODE = TARGET.scripted.encode
PROMPT = ENCODE("user: why?\n<think>\n")
STEPS = ("First.\n\n", "So b.\n\n", "Done")


def upper(text: str) -> Tokens:
    """A tokenizer of its own."""
    return ENCODE(text.upper())


@asynccontextmanager
async def reward(fake: FakeVllm, kind: str = "thinkserve", **settings: Any) -> AsyncIterator[RemoteModel]:
    """The fake as a reward model."""
    async with fake.running() as url:
        model = await connect(url, RemoteSettings(reward_format=kind, **settings), TARGET, "reward")
        fake.asked.clear()
        try:
            yield model
        finally:
            await model.aclose()


def expected(tokens: Tokens, end: int) -> float:
    """What the fake's logits (place, token) at a place amount to."""
    return sigmoid((float(tokens[end]) - end,))


async def test_each_step_gets_the_reward_at_its_end() -> None:
    """Of several paths at once, in one request; known steps are read and not told again."""
    fake = FakeVllm()
    paths = [Path(STEPS[:1]), Path(STEPS, known=1), Path(STEPS[:2], known=2), Path(())]
    async with reward(fake) as model:
        scores = await model.engine("req", "tenant").score("why?", paths)
    tokens = PROMPT + ENCODE("".join(STEPS))
    ends = [len(PROMPT) + len(ENCODE("".join(STEPS[: n + 1]))) - 1 for n in range(3)]
    sent = fake.bodies("/pooling")

    assert [(expected(tokens, ends[0]),), tuple(expected(tokens, end) for end in ends[1:]), (), ()] == [
        score.rewards for score in scores
    ]
    assert [ends[0] + 1, len(tokens), 0, 0] == [score.tokens for score in scores]
    assert [[list(tokens[: ends[0] + 1]), list(tokens)]] == [body.pop("input") for body in sent]
    assert {
        "model": "big", "task": "token_classify", "use_activation": False, "encoding_format": "base64",
        "embed_dtype": "float32", "endianness": "little",
    } == {name: value for name, value in sent[0].items() if name != "cache_salt"}  # fmt: skip
    assert 32 == len(sent[0]["cache_salt"])


async def test_nothing_to_score_asks_nothing() -> None:
    """No paths, or all their steps known."""
    fake = FakeVllm()
    async with reward(fake) as model:
        assert [] == await model.engine("req").score("why?", [])
        assert [()] == [score.rewards for score in await model.engine("req").score("why?", [Path(STEPS, 3)])]

    assert [] == fake.bodies("/pooling")


async def test_a_question_is_rendered_once() -> None:
    """Longer paths of the same question ask for nothing but their logits."""
    fake = FakeVllm()
    async with reward(fake) as model:
        for _ in range(3):
            await model.engine("req").score("why?", [Path(STEPS)])

    assert (1, 3) == (len(fake.bodies("/tokenize")), len(fake.bodies("/pooling")))


async def test_steps_beyond_the_context_have_no_reward() -> None:
    """NaN, which is the worst; the steps that fit are scored."""
    long = Path((*STEPS[:2], "w" * 2000, "x"), known=1)
    async with reward(FakeVllm()) as model:
        [score] = await model.engine("req").score("why?", [long])

    assert [False, True, True] == [math.isnan(each) for each in score.rewards]


async def test_a_model_that_pools_its_step_markers_only() -> None:
    """As many rows as steps come back, and are the steps'."""

    async def fault(asked: Asked, stream: ByteStream) -> bool:
        if asked.path != "/pooling":
            return False
        markers = asked.body["input"][0].count(ENCODE("#")[0])
        data = b64encode(b"".join(pack("<2f", at, at + 1) for at in range(markers))).decode()
        await stream.send(told({"data": [{"index": 0, "data": data}]}))
        return True

    fake = FakeVllm(fault=fault, encode=lambda text: ENCODE(text.replace("<extra_0>", "#")))
    async with reward(fake, "qwen2.5-math-prm") as model:
        [score] = await model.engine("req").score("why?", [Path(STEPS, 1)])
    sent = fake.bodies("/pooling")[0]["input"][0]

    assert (sigmoid((1.0,)), sigmoid((1.0,))) == score.rewards
    assert list(ENCODE("First.#So b.#Done#")) == sent[-len("First.#So b.#Done#") :]


async def test_a_tokenizer_of_its_own_is_asked_once_per_text() -> None:
    """Each step is tokenized by its server, and remembered."""
    fake = FakeVllm(encode=upper)
    async with reward(fake) as model:
        first = await model.engine("req").score("why?", [Path(STEPS[:2]), Path(STEPS)])
        again = await model.engine("req").score("why?", [Path(STEPS[:2]), Path(STEPS)])
    sent = fake.bodies("/pooling")

    assert first == again
    assert list(upper("user: why?\n<think>\n" + "".join(STEPS))) == sent[0]["input"][1]
    assert 1 + len(STEPS) == len(fake.bodies("/tokenize"))


def test_a_memory_of_texts_is_bounded_in_texts_and_in_tokens() -> None:
    """What was used last stays; long texts are not kept at all, and none is counted twice."""
    memory = Memory(texts=3, tokens=10, chars=5)
    memory.keep("long..", (1,))
    for text in ("a", "b", "c", "c"):
        memory.keep(text, (1, 2, 3))
    memory.find("a")
    memory.keep("d", ())

    assert [None, (1, 2, 3), None, (1, 2, 3), ()] == [memory.find(text) for text in ("long..", "a", "b", "c", "d")]
    memory.keep("e", (1,) * 8)
    assert [None, None, (), (1,) * 8] == [memory.find(text) for text in ("a", "c", "d", "e")]
    memory.keep("f", (1,) * 11)
    assert [None, None, None] == [memory.find(text) for text in ("d", "e", "f")]
    memory.keep("g", (1,) * 10)
    assert (1,) * 10 == memory.find("g")


async def test_a_question_without_a_chat() -> None:
    """Skywork's family: the beginning of a sequence, the question on a line, and one value per token."""
    fake = FakeVllm(labels=1)
    async with reward(fake, "skywork-o1-prm", begin="<eos>") as model:
        [score] = await model.engine("req").score("why?", [Path(("a", "b"))])
    tokens = ENCODE("<eos>why?\na\nb\n")

    assert [list(tokens)] == fake.bodies("/pooling")[0]["input"]
    assert (sigmoid((len(tokens) - 3.0,)), sigmoid((len(tokens) - 1.0,))) == score.rewards


@pytest.mark.parametrize(
    "data",
    [
        None, [], {}, [7], [{"data": "!!"}], [{"data": [[0.1, 0.2]]}], [{"data": b64encode(b"1234567").decode()}],
        [{"data": b64encode(bytes(8 * 7)).decode()}],
    ],
)  # fmt: skip
async def test_logits_that_do_not_fit_are_an_error(data: object) -> None:
    """None, too few, unreadable: never a wrong reward."""
    asked_before = 0

    async def fault(asked: Asked, stream: ByteStream) -> bool:
        nonlocal asked_before
        asked_before += asked.path == "/pooling"
        if asked.path != "/pooling" or asked_before == 1:
            return False
        await stream.send(told({"data": data}))
        return True

    async with reward(FakeVllm(fault=fault)) as model:
        with pytest.raises(EngineFailed, match=r"^The remote reward "):
            await model.engine("req").score("why?", [Path(STEPS)])


async def test_a_server_that_fails_at_a_step_is_one_error() -> None:
    """Not a group of them, though the texts are tokenized side by side."""
    down = False

    async def fault(asked: Asked, stream: ByteStream) -> bool:
        if down and asked.path == "/tokenize":
            await stream.send(told({}, 500))
        return down and asked.path == "/tokenize"

    async with reward(FakeVllm(encode=upper, fault=fault), retries=0) as model:
        await model.engine("req").score("why?", [])
        down = True
        with pytest.raises(EngineFailed, match="answered 500"):
            await model.engine("req").score("why?", [Path(STEPS)])


async def test_a_reward_model_does_not_write() -> None:
    """Unsupported, before anything is sent."""
    fake = FakeVllm()
    async with reward(fake) as model:
        with pytest.raises(Unsupported, match="does not write"):
            model.engine("req").generate(Job((5,), 1))

    assert [] == fake.asked


async def test_a_model_with_other_labels_is_no_such_reward_model() -> None:
    """Found out at the start."""
    async with FakeVllm(labels=3).running() as url:
        with pytest.raises(StartError, match="of a model with 2 labels"):
            await connect(url, RemoteSettings(reward_format="thinkserve"), TARGET, "reward")


async def test_the_family_is_named_or_told_by_the_models_name() -> None:
    """Never guessed: a wrong one gives numbers that mean nothing."""
    fake = FakeVllm(models=[card("prm", root="Qwen/Qwen2.5-Math-PRM-7B")])
    async with fake.running() as url:
        model = await connect(url, RemoteSettings(), TARGET, "reward")
        await model.aclose()

    assert "qwen2.5-math-prm" == named_format(None, "Qwen/Qwen2.5-Math-PRM-7B").name
    assert "skywork-o1-prm" == named_format("skywork-o1-prm", "Qwen/Qwen2.5-Math-PRM-7B").name
    for asked, name in ((None, "my-prm"), ("nope", "Qwen2.5-Math-PRM-7B")):
        with pytest.raises(StartError, match=r"thinkserve, qwen2\.5-math-prm, skywork-o1-prm"):
            named_format(asked, name)


async def test_a_server_that_answers_without_rewards_is_left_alone_in_the_end() -> None:
    """However well-formed its answers are."""

    async def hollow(asked: Asked, stream: ByteStream) -> bool:
        if asked.path != "/pooling":
            return False
        await stream.send(told({"data": []}))
        return True

    fake = FakeVllm()
    async with reward(fake, retries=0, breaker_failures=3) as model:
        fake.fault = hollow
        for _ in range(9):
            with pytest.raises(EngineFailed):
                await model.engine("req").score("why?", [Path(STEPS)])
        assert not model.alive

    assert 3 == len(fake.bodies("/pooling"))
