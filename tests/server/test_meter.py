"""MeteredEngine counts what the engine generated: read or not, in every chain, each chain once."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thinkserve.server.meter import MeteredEngine
from thinkserve.server.metrics import Metrics
from thinkserve.strategies import registry
from thinkserve.strategies.engine import Job, Path, Task
from thinkserve.strategies.errors import EngineFailed
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


@pytest.mark.parametrize("seed", [None, 1])
async def test_jobs_of_one_number_are_one_chain(seed: int | None) -> None:
    """One goes on where the other was left, or draws anew what it had written: one chain, both counts."""
    engine = ScriptedEngine(["abcdefgh"])
    meter = metered(engine)
    job = Job(prompt=(5,), max_tokens=50, seed=seed)
    first = await read(meter, job, deltas=3)
    await read(meter, replace(job, prompt=job.prompt + first[:1], max_tokens=2))
    assert (1, 1) == (len(meter.chains), meter.finished)

    await read(meter, job, deltas=1)
    assert (1, 0) == (len(meter.chains), meter.finished)
    assert [3 + 2 + 1] == [chain.generated for chain in meter.chains] == [engine.generated]


async def test_jobs_of_other_numbers_are_chains_of_their_own() -> None:
    """Alike as they may be; each is told what its own first prompt found in the cache."""
    meter = metered(ScriptedEngine(["a"]))
    for number in (0, 7, 3):
        await read(meter, Job(prompt=(5,), max_tokens=5, chain=number))
    assert [2, 2, 2] == [chain.generated for chain in meter.chains]


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


@pytest.mark.parametrize("commit_peek", [True, False])
async def test_two_models_that_take_turns_write_one_chain(commit_peek: bool) -> None:
    """Peeks that are kept, drawn anew or replaced by the guide's drafts are all of it."""
    known = ScriptedEngine([])
    prompt = known.encode("q<think>")
    whole = prompt + known.encode("So 3+4=7.\n\nThen 7+1=8.\n\nWait, is it?\n\nYes.\n\n</think>8") + known.info().eos
    engine = ScriptedEngine(lambda job, _: whole[len(job.prompt) :], roles=("target", "guide"))
    meter, entry = metered(engine), registry.get("speculative-thinking")
    options = entry.options.model_validate({"n1": 8, "commit_peek": commit_peek})
    await entry.run(Task(prompt=prompt, max_tokens=80, seed=3), meter, Recorder(), options)

    assert meter.jobs["target"] > 3
    assert meter.jobs["guide"] > 0
    assert (1, 1) == (len(meter.chains), meter.finished)
    assert meter.generated == engine.generated


@pytest.mark.parametrize("name", ["beam", "particle", "dvts", "a-star"])
async def test_a_search_has_as_many_chains_as_branches(name: str) -> None:
    """A node's first proposal goes on with its chain; every other one begins a chain."""
    engine = ScriptedEngine(lambda job, index: f"{index} " + "step\n\n" * 9, roles=("target", "reward"))
    meter, entry, recorder = metered(engine), registry.get(name), Recorder()
    await entry.run(Task(prompt=(5,), max_tokens=40, seed=3, phase="answer"), meter, recorder, entry.options())

    parents = [event.data["parent"] for event in recorder.events if event.type == "node.created"]
    inner = {parent for parent in parents if parent is not None}
    assert len(parents) - len(inner) == len(meter.chains) > 1
