"""MeteredEngine counts what the engine generated: read or not, in every chain, each chain once."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from time import thread_time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thinkserve.server.meter import MeteredEngine
from thinkserve.server.metrics import Metrics
from thinkserve.strategies import registry
from thinkserve.strategies.engine import Delta, Job, Path, Stream, Task
from thinkserve.strategies.errors import EngineFailed
from thinkserve.strategies.streams import Told
from thinkserve.strategies.testing import Recorder, ScriptedEngine

pytestmark = pytest.mark.anyio


def metered(engine: ScriptedEngine) -> MeteredEngine:
    return MeteredEngine(engine, Metrics())


async def read(engine: MeteredEngine, job: Job, deltas: int = 10**6) -> tuple[int, ...]:
    tokens: tuple[int, ...] = ()
    async with engine.generate(job) as stream:
        async for delta in stream:
            tokens += delta.tokens
            deltas -= 1
            if deltas == 0:
                break
    return tokens


async def test_tokens_that_nobody_read_are_counted() -> None:
    """What the engine still sampled for a job that was left belongs to the bill."""
    engine = ScriptedEngine(["abcdefgh"], overrun=3)
    meter = metered(engine)
    assert len(await read(meter, Job(prompt=(5,), max_tokens=50, seed=1), deltas=2)) == 2
    assert meter.generated == engine.generated == 5
    assert (meter.finished, len(meter.chains)) == (0, 1)


async def test_a_job_that_goes_on_where_one_was_left_is_the_same_chain() -> None:
    """Same seed and a longer prompt: one chain, both counts."""
    engine = ScriptedEngine(["abcdefgh"])
    meter = metered(engine)
    job = Job(prompt=(5,), max_tokens=50, seed=1)
    first = await read(meter, job, deltas=3)
    await read(meter, replace(job, prompt=job.prompt + first))
    assert len(meter.chains) == 1
    assert meter.generated == engine.generated == 9
    assert meter.finished == 1


async def test_a_job_without_a_seed_is_known_by_what_it_repeats() -> None:
    """Of several chains with the same prompt, the one whose tokens it goes on from; a branch is a chain of its own."""
    engine = ScriptedEngine(lambda job, index: "abcdefgh"[index:])
    meter = metered(engine)
    job = Job(prompt=(5,), max_tokens=3)
    first, second = [await read(meter, job) for _ in range(2)]
    await read(meter, replace(job, prompt=job.prompt + second[:2] + engine.encode("!")))
    assert [3, 6] == [chain.generated for chain in meter.chains]

    await read(meter, replace(job, prompt=job.prompt + first))
    await read(meter, replace(job, prompt=job.prompt + first))
    assert [6, 6, 3] == [chain.generated for chain in meter.chains]


async def test_jobs_with_other_seeds_or_none_are_chains_of_their_own() -> None:
    """Where they begin at the same prompt."""
    meter = metered(ScriptedEngine(["a"]))
    for seed in (1, 2, None, None):
        await read(meter, Job(prompt=(5,), max_tokens=5, seed=seed))
    assert len(meter.chains) == 4


async def test_the_segments_of_a_chain_are_one_chain() -> None:
    """However often it is interrupted."""
    engine = ScriptedEngine(["abcdefgh"])
    meter = metered(engine)
    async with meter.chain(Job(prompt=(5,), max_tokens=50, seed=1)) as chain:
        for _ in range(3):
            async with chain.segment(2) as stream:
                async for _delta in stream:
                    pass
    assert len(meter.chains) == 1
    assert meter.generated == engine.generated == 6


async def test_tokens_of_a_completion_that_no_model_wrote_are_known() -> None:
    """Two cues of ours; a verifier's words and a chain that went another way do not make them a model's."""
    engine = ScriptedEngine(lambda job, _: "abcdef" if job.role == "target" else "??", roles=("target", "verifier"))
    meter, cue = metered(engine), engine.encode("??")
    job = Job(prompt=(5, 6), max_tokens=3)
    first = await read(meter, job)
    await read(meter, job)
    second = await read(meter, replace(job, prompt=job.prompt + first + cue))
    await read(meter, replace(job, prompt=job.prompt + first, role="verifier"))

    assert 6 == meter.drawn(2, [*first, *cue, *second, *cue])
    assert (3, 0, 0) == (meter.drawn(2, first), meter.drawn(2, cue), meter.drawn(9, first))


async def test_a_chain_that_failed_says_so() -> None:
    """A failure is neither an end nor an abort."""
    meter = metered(ScriptedEngine(["abc"], fail={0: (1, EngineFailed("lost"))}))
    with pytest.raises(EngineFailed):
        await read(meter, Job(prompt=(5,), max_tokens=5, seed=1))
    assert [(chain.failed, chain.finish, chain.live) for chain in meter.chains] == [(True, None, False)]


async def test_roles_are_counted_apart() -> None:
    """A guide's tokens are not the target's."""
    meter = metered(ScriptedEngine(["abc"], roles=("target", "guide")))
    await read(meter, Job(prompt=(5,), max_tokens=2, seed=1))
    await read(meter, Job(prompt=(5,), max_tokens=3, seed=1, role="guide"))
    assert meter.by_role() == {"target": 2, "guide": 3}


@pytest.mark.parametrize("name", ["single", "majority", "short-m-at-k"])
@given(lengths=st.lists(st.integers(0, 40), min_size=8, max_size=8), overrun=st.integers(0, 3), burst=st.integers(1, 4))
@settings(max_examples=20, deadline=None)
async def test_the_bill_is_the_engines_for_every_strategy(
    name: str, lengths: list[int], overrun: int, burst: int
) -> None:
    """Whatever chains do, the meter and the engine agree to the token."""
    engine = ScriptedEngine(["t" * n + "</think>\\boxed{1}" for n in lengths], overrun=overrun, burst=burst)
    meter, entry = metered(engine), registry.get(name)
    await entry.run(Task(prompt=(5,), max_tokens=60, seed=3), meter, Recorder(), entry.options())
    assert meter.generated == engine.generated
    assert engine.live == []


async def test_helpers_are_counted_apart_from_the_chains() -> None:
    """Their tokens are on the bill, their jobs are no chains."""
    engine = ScriptedEngine(["abcd"], roles=("target", "guide", "verifier"))
    meter = metered(engine)
    for role, tokens in (("target", 9), ("guide", 3), ("verifier", 1), ("verifier", 1)):
        await read(meter, Job(prompt=(5,), max_tokens=tokens, role=role))  # type: ignore[arg-type]

    assert {"target": 5, "guide": 3, "verifier": 2} == meter.by_role()
    assert 10 == meter.generated == engine.generated
    assert (1, 1, 2) == (len(meter.chains), meter.finished, meter.jobs["verifier"])


async def test_passes_of_a_reward_model_are_counted_without_what_it_knew() -> None:
    """A pass per path; a path of which nothing was wanted costs none."""
    meter = metered(ScriptedEngine([], roles=("reward",)))
    await meter.score("q", [Path(("ab",)), Path(("ab", "cde"), known=1)])
    await meter.score("q", [])

    assert (2, 2 + 5, 2) == (meter.scored.passes, meter.scored.tokens, meter.scored.cached)
    assert 0 == meter.generated


async def test_the_part_of_the_prompts_that_was_cached_is_known_from_the_second_job_on() -> None:
    """Of one job it says nothing that `cached_tokens` does not."""
    meter = metered(ScriptedEngine(["abcd"]))
    job = Job(prompt=(5,) * 4, max_tokens=50, seed=1)
    await read(meter, job, deltas=1)
    assert meter.hit_ratio is None

    await read(meter, replace(job, prompt=(5,) * 6))
    assert 0.4 == meter.hit_ratio


async def test_a_branch_that_begins_alike_is_a_chain_of_its_own() -> None:
    """One token in common does not make the second child of one node a child of its sibling's."""
    texts = {"": ("17+", "17*"), "17*": ("1", "2")}
    engine = ScriptedEngine(lambda job, _: texts[engine.decode(job.prompt[1:])][len(meter.chains) % 2 - 1])
    meter = metered(engine)
    job = Job(prompt=(5,), max_tokens=3)
    first, second = [await read(meter, job) for _ in range(2)]
    assert first[:2] == second[:2]

    child = replace(job, prompt=job.prompt + second)
    async with meter.generate(child) as one, meter.generate(child) as other:
        for stream in (one, other):
            async for _ in stream:
                pass

    assert [3, 3 + 2, 2] == [chain.generated for chain in meter.chains]


class Terse(ScriptedEngine):
    """Says one token, whatever it is asked; unlike its base it does not look at what was said before."""

    @asynccontextmanager
    async def generate(self, job: Job) -> AsyncIterator[Stream]:
        """One token and the end."""
        yield Told(Delta((9,), finish="length"))


async def test_thousands_of_branches_do_not_slow_each_other_down() -> None:
    """The chain that a job goes on with is found without looking at all of them."""
    meter, spent = metered(Terse([])), list[float]()
    for size in (500, 501):
        started = thread_time()
        for index in range(2000):
            await read(meter, Job((5,) * size + (index % 250 + 10,) * 500, max_tokens=1))
        spent.append(thread_time() - started)

    assert spent[1] < 3 * spent[0]
    assert 4000 == len(meter.chains)


@pytest.mark.parametrize("seed", [None, 4])
async def test_a_chain_whose_last_words_others_replaced_is_the_same_chain(seed: int | None) -> None:
    """A guide's draft in place of the target's peek. Where several began at one place it is nobody's."""
    engine = ScriptedEngine(["abc"], roles=("target", "guide"))
    meter = metered(engine)
    job = Job(prompt=(5,), max_tokens=3, seed=seed)
    first = await read(meter, job)
    peek = replace(job, prompt=job.prompt + first, seed=seed and seed + 1)
    await read(meter, peek)
    await read(meter, replace(peek, role="guide"))
    drafted = replace(peek, prompt=peek.prompt + engine.encode("xyz"), seed=seed and seed + 2)
    await read(meter, drafted)
    assert (1, 1) == (len(meter.chains), meter.finished)

    other = replace(job, prompt=(6,))
    await read(meter, other)
    await read(meter, replace(other, seed=seed and seed + 3))
    await read(meter, replace(other, prompt=(6, *engine.encode("xyz")), seed=seed and seed + 4))
    assert 4 == len(meter.chains)
