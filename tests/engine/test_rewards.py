"""Reward models of every family on real vLLM: right at each step, read on from where they were, never brought down."""

from __future__ import annotations

import math
from collections.abc import Iterator

import anyio
import pytest
from anyio.from_thread import BlockingPortal
from anyio.lowlevel import checkpoint

from tests.engine import tiny_rewards
from tests.engine.tiny_rewards import HEADS, MARKER, Tiny
from thinkserve.server.deployment import Local
from thinkserve.server.model_dir import check_model
from thinkserve.server.settings import Settings
from thinkserve.server.vllm_engine import start
from thinkserve.server.vllm_reward import RewardBackend
from thinkserve.strategies.engine import Job, Path, Score
from thinkserve.strategies.errors import EngineDead, Unsupported

QUESTION = "Start with 17. Add 25. Multiply by 3. What is the result?"
# Long enough that each step fills blocks of the cache.
STEPS = tuple(f"{'17 + 25 = 42. ' * 5}So {n}.\n\n" for n in range(4))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tiny]:
    """A model of each family, by architecture."""
    return {name: tiny_rewards.make(tmp_path_factory.mktemp("prm"), name) for name in HEADS}


@pytest.fixture(scope="module")
def engines(portal: BlockingPortal, tiny: dict[str, Tiny]) -> Iterator[dict[str, RewardBackend]]:
    """All of them at once in this process."""
    places = [Local(("reward",), check_model(each.folder), name, kv_gib=0.02) for name, each in tiny.items()]
    started = portal.call(start, Settings(dtype="float32"), places)
    yield {place.name: each for place, each in zip(places, started, strict=True) if isinstance(each, RewardBackend)}
    for each in started:
        portal.call(each.aclose)


@pytest.fixture(params=HEADS)
def model(request: pytest.FixtureRequest, engines: dict[str, RewardBackend]) -> RewardBackend:
    """One family after the other."""
    return engines[request.param]


async def score(model: RewardBackend, *paths: Path, salt: str = "s") -> list[Score]:
    return await model.engine("req", salt).score(QUESTION, paths)


@pytest.mark.parametrize("name", HEADS)
def test_rewards_are_what_transformers_computes(
    portal: BlockingPortal, engines: dict[str, RewardBackend], tiny: dict[str, Tiny], name: str
) -> None:
    """At the last token of each step, from the logits of the family's head."""
    model = engines[name]
    found = portal.call(lambda: score(model, Path(STEPS), salt="truth"))[0]

    prompt = portal.call(model.engine("req")._prompt, QUESTION)
    read = model.format.read(prompt, Path(STEPS), model.renderer.encode)
    expected = [model.format.probability(row) for row in tiny[name].logits(read.tokens, read.ends)]
    assert pytest.approx(expected, abs=1e-4) == found.rewards
    assert (len(read.tokens), 0) == (found.tokens, found.cached)
    assert max(expected) - min(expected) > 1e-3
    if name == "Qwen2ForProcessRewardModel":
        assert list(model.renderer.encode(MARKER)) == [read.tokens[end] for end in read.ends[:1]]


def test_reading_on_equals_reading_in_full(portal: BlockingPortal, model: RewardBackend) -> None:
    """Step by step with the cache, in one pass without: the same rewards, and most tokens are not read again."""

    async def scenario() -> tuple[Score, list[Score]]:
        (whole,) = await score(model, Path(STEPS), salt="whole")
        grown = [(await score(model, Path(STEPS[: n + 1], n), salt="grown"))[0] for n in range(len(STEPS))]
        return whole, grown

    whole, grown = portal.call(scenario)
    assert pytest.approx(whole.rewards, abs=1e-4) == [reward for each in grown for reward in each.rewards]
    assert [1, 1, 1, 1] == [len(each.rewards) for each in grown]
    assert all(each.tokens - each.cached < 150 for each in grown[1:])
    assert grown[-1].cached > 100


def test_a_cache_that_knows_more_than_the_caller_changes_nothing(portal: BlockingPortal, model: RewardBackend) -> None:
    """Another path has been there before: its tokens have no logits any more, and are read again."""

    async def scenario() -> list[Score]:
        await score(model, Path(STEPS), salt="ahead")
        return await score(model, Path(STEPS, 1), Path(STEPS), salt="ahead")

    some, whole = portal.call(scenario)
    assert pytest.approx(whole.rewards[1:], abs=1e-4) == some.rewards
    assert some.tokens > whole.tokens


def test_many_paths_are_one_batch(portal: BlockingPortal, model: RewardBackend) -> None:
    """Each gets its own rewards, in the order of the paths."""
    paths = [Path(STEPS[: n % 4 + 1]) for n in range(24)]

    async def scenario() -> tuple[list[Score], list[Score]]:
        alone = [(await score(model, path, salt=f"alone-{n}"))[0] for n, path in enumerate(paths[:4])]
        return alone, await score(model, *paths, salt="together")

    alone, together = portal.call(scenario)
    for index, each in enumerate(together):
        assert pytest.approx(alone[index % 4].rewards, abs=1e-4) == each.rewards


def test_what_is_too_long_is_no_number_and_harms_nobody(portal: BlockingPortal, model: RewardBackend) -> None:
    """Steps that fit keep their rewards, behind a question that does not fit there are none; the engine goes on."""
    endless = Path((STEPS[0], "1 2 3 4 5 6 7 8 " * 200, STEPS[1]))

    async def scenario() -> tuple[list[Score], list[Score]]:
        return await score(model, endless, Path(STEPS[:1]), salt="long"), await score(model, Path((), 0), salt="long")

    async def question() -> list[Score]:
        return await model.engine("req").score("1 2 3 4 5 6 7 8 " * 200, [Path(STEPS, 1), Path(STEPS[:1])])

    (long, short), (nothing,) = portal.call(scenario)
    assert [3, 1] == [len(each.rewards) for each in portal.call(question)]
    assert all(math.isnan(reward) for each in portal.call(question) for reward in each.rewards)
    assert pytest.approx(short.rewards[0], abs=1e-4) == long.rewards[0]
    assert [True, True] == [math.isnan(reward) for reward in long.rewards[1:]]
    assert ((), 0) == (nothing.rewards, nothing.tokens)
    assert model.alive
    assert model.unfinished == 0


def test_a_pass_that_is_left_is_gone(portal: BlockingPortal, model: RewardBackend) -> None:
    """Cancelling a batch leaves nothing in the engine."""

    async def scenario() -> int:
        for turns in range(12):
            with anyio.CancelScope() as scope:
                async with anyio.create_task_group() as group:
                    group.start_soon(lambda: score(model, *[Path(STEPS)] * 8, salt="left"))
                    for _ in range(turns):
                        await checkpoint()
                    scope.cancel()
        return model.unfinished

    assert 0 == portal.call(scenario)


def test_a_reward_model_does_not_write(portal: BlockingPortal, model: RewardBackend) -> None:
    """Asked to, it says so."""

    async def write() -> None:
        async with model.engine("req").generate(Job((5,), 5)):
            pass

    with pytest.raises(Unsupported):
        portal.call(write)


def test_what_has_been_stopped_is_dead(portal: BlockingPortal, engines: dict[str, RewardBackend]) -> None:
    """The last of these tests: a closed engine refuses with the error that its clients know."""
    model = engines["Qwen2ForPrmModel"]
    portal.call(model.aclose)

    with pytest.raises(EngineDead):
        portal.call(model.check)
    with pytest.raises(EngineDead):
        portal.call(lambda: score(model, Path(STEPS)))
