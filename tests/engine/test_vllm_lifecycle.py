"""Leaving a `generate` block ends the job in vLLM, whenever and however it is left, and every token is counted."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from random import Random

import anyio
import pytest
from anyio.from_thread import BlockingPortal
from prometheus_client import REGISTRY

from thinkserve.server.vllm_engine import VllmBackend
from thinkserve.strategies.engine import Delta, Job, Sampling, Tokens

PROMPT: Tokens = (5, 6, 7, 8, 9)


def endless(backend: VllmBackend, prompt: Tokens = PROMPT, seed: int = 1, max_tokens: int = 2000) -> Job:
    """A job that does not end by itself before `max_tokens`."""
    never = tuple((token, -100.0) for token in backend.info.eos)
    return Job(prompt=prompt, max_tokens=max_tokens, sampling=Sampling(logit_bias=never), seed=seed)


def scheduled() -> float:
    """Requests that vLLM's scheduler holds, running and waiting."""
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting")
    return sum(s.value for f in REGISTRY.collect() if f.name in names for s in f.samples)


async def assert_idle(backend: VllmBackend) -> None:
    """Nothing is left in the front end, and after one more small request nothing in the scheduler."""
    assert backend.unfinished == 0
    async with backend.engine("probe").generate(endless(backend, max_tokens=2)) as stream:
        assert [delta async for delta in stream][-1].finish == "length"
    for _ in range(500):
        if scheduled() == 0:
            break
        await anyio.sleep(0.01)
    assert (scheduled(), backend.unfinished) == (0, 0)


def test_leaving_the_block_ends_the_job_in_the_engine(portal: BlockingPortal, backend: VllmBackend) -> None:
    """A job left after three deltas is gone from vLLM at once, and yields nothing more."""

    async def scenario() -> None:
        async with backend.engine("left").generate(endless(backend)) as stream:
            for _ in range(3):
                await anext(stream)
            assert backend.unfinished == 1
        assert backend.unfinished == 0
        assert [delta async for delta in stream] == []
        assert 3 <= stream.generated < 2000
        await assert_idle(backend)

    portal.call(scenario)


def test_an_error_inside_the_block_ends_the_job(portal: BlockingPortal, backend: VllmBackend) -> None:
    """The caller's exception comes through unchanged and the job is gone."""

    async def failing() -> None:
        async with backend.engine("failed").generate(endless(backend)) as stream:
            await anext(stream)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        portal.call(failing)
    portal.call(assert_idle, backend)


@pytest.mark.parametrize("native", [True, False], ids=["task-cancel", "cancel-scope"])
def test_a_cancel_at_any_turn_leaves_nothing_behind(portal: BlockingPortal, backend: VllmBackend, native: bool) -> None:
    """Cancelling after 0, 1, 2, ... turns of the event loop, the turns of submission included, leaves vLLM idle."""

    async def run(scope: anyio.CancelScope) -> None:
        with scope:
            async with backend.engine("cancelled").generate(endless(backend)) as stream:
                async for _ in stream:
                    pass

    async def scenario() -> None:
        for turns in range(200):
            scope = anyio.CancelScope()
            task = asyncio.ensure_future(run(scope))
            for _ in range(turns):
                await asyncio.sleep(0)
            if native:
                task.cancel()
            else:
                scope.cancel()
            await asyncio.wait([task])
            assert backend.unfinished == 0
        await assert_idle(backend)

    portal.call(scenario)


def test_tokens_come_together_where_the_job_says_so(portal: BlockingPortal, backend: VllmBackend) -> None:
    """The first at once, then at least so many, then the rest; they are the same tokens."""

    async def deltas(job: Job) -> list[Delta]:
        async with backend.engine("together").generate(job) as stream:
            return [delta async for delta in stream]

    async def scenario() -> None:
        job = endless(backend, max_tokens=50)
        single, many = await deltas(job), await deltas(replace(job, interval=16))
        assert [token for delta in many for token in delta.tokens] == [t for delta in single for t in delta.tokens]
        first, *middle, last = [len(delta.tokens) for delta in many]
        # A reader that is late gets more.
        assert first <= 16 <= min(middle)
        assert (True, "length") == (len(middle) <= 3, many[-1].finish)
        assert 50 == 1 + sum(middle) + last
        numbered = await deltas(replace(job, interval=16, logprobs=0))
        assert [delta.tokens for delta in many] != [delta.tokens for delta in numbered]
        assert 50 == sum(len(delta.logprobs) for delta in numbered)

    portal.call(scenario)


def test_what_was_held_back_can_be_read(
    portal: BlockingPortal, backend: VllmBackend, counted: Callable[[], int]
) -> None:
    """Every token that was counted, once: at a deadline nothing is lost."""

    async def scenario() -> None:
        await assert_idle(backend)
        before, read = counted(), list[int]()
        async with backend.engine("held").generate(replace(endless(backend), interval=500)) as stream:
            read += (await anext(stream)).tokens
            for _ in range(3):
                with anyio.move_on_after(0.1):
                    await anext(stream)
                read += stream.unread().tokens
                assert len(read) == stream.generated
        await anyio.sleep(0.1)
        assert 1 < len(read) < 500
        assert counted() - before == stream.generated >= len(read)
        again = replace(endless(backend), max_tokens=len(read))
        async with backend.engine("held").generate(again) as stream:
            assert read == [token async for delta in stream for token in delta.tokens]

    portal.call(scenario)


@pytest.mark.parametrize("seed", range(5))
def test_generated_equals_the_counter_of_vllm(
    portal: BlockingPortal, backend: VllmBackend, counted: Callable[[], int], seed: int
) -> None:
    """Over finished, left, timed-out and never-read chains, the streams' counts add up to vLLM's, exactly."""
    draw = Random(seed)
    cases = [(index, draw.randint(1, 60), draw.randint(0, 60), draw.choice([0.0, 0.0, 0.01])) for index in range(8)]

    async def chain(index: int, limit: int, leave: int, pause: float) -> int:
        read = 0
        job = replace(endless(backend, seed=index, max_tokens=limit), interval=draw.choice([1, 16]))
        async with backend.engine(f"mix-{index}").generate(job) as stream:
            with anyio.move_on_after(0.2):
                await anyio.sleep(pause)
                while read < leave:
                    delta = await anext(stream)
                    read += len(delta.tokens)
                    # A slow reader: tokens pile up unread behind it.
                    await anyio.sleep(pause)
                    if delta.finish:
                        break
        assert read <= stream.generated <= limit
        return stream.generated

    async def scenario() -> None:
        await assert_idle(backend)
        before = counted()
        totals = await asyncio.gather(*(chain(*case) for case in cases))
        assert backend.unfinished == 0
        # vLLM raises its counter once per engine step, after that step's outputs have been handed out.
        await anyio.sleep(0.1)
        assert sum(totals) == counted() - before

    portal.call(scenario)


def test_a_prompt_alone_and_beside_random_neighbours_gives_the_same_tokens(
    portal: BlockingPortal, backend: VllmBackend
) -> None:
    """Twenty neighbours with random sampling, coming, reading and being aborted, change nothing of a greedy chain."""
    greedy = Job(prompt=PROMPT, max_tokens=150, sampling=Sampling(temperature=0.0))

    async def tokens() -> Tokens:
        async with backend.engine("canary").generate(greedy) as stream:
            return tuple([token async for delta in stream for token in delta.tokens])

    async def neighbour(index: int) -> None:
        draw = Random(index)
        prompt = tuple(draw.randrange(250) for _ in range(draw.randint(1, 80)))
        async with backend.engine(f"neighbour-{index}").generate(endless(backend, prompt, seed=index)) as stream:
            for _ in range(draw.randint(1, 60)):
                await anext(stream)

    async def scenario() -> None:
        alone = await tokens()
        async with anyio.create_task_group() as group:
            for index in range(20):
                group.start_soon(neighbour, index)
            beside = await tokens()
        assert alone == beside
        await assert_idle(backend)

    portal.call(scenario)
