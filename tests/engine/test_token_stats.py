"""Token statistics on real vLLM: what the raw logits say, of the right request, beside the right token."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import astuple
from typing import Any

import pytest
import torch
from anyio.from_thread import BlockingPortal

from thinkserve.kernels.token_stats import reference
from thinkserve.server.model_dir import find_model
from thinkserve.server.settings import Settings
from thinkserve.server.vllm_engine import VllmBackend
from thinkserve.strategies.engine import Delta, Job, Sampling, Task, Tokens, TokenStats
from thinkserve.strategies.testing import play

PROMPT: Tokens = (5, 6, 7, 8, 9)
# Rounding of float32 in another order of summation, over logits of up to about 50.
CLOSE = 2e-3


@pytest.fixture(scope="session")
def exact() -> Any:
    """The embedded model in Hugging Face's implementation, in float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(find_model(Settings().model).path, dtype=torch.float32)
    return model.eval()


def computed(exact: Any, prompt: Tokens, tokens: Tokens, close: int) -> list[list[float]]:
    """The four numbers of each token, from a forward pass over the whole sequence at once."""
    with torch.inference_mode():
        logits = exact(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    rows: list[list[float]] = reference(logits, exact.config.vocab_size, close)[:, 2:].tolist()
    return rows


async def run(backend: VllmBackend, job: Job) -> list[Delta]:
    """All deltas of a job."""
    async with backend.engine("stats").generate(job) as stream:
        return [delta async for delta in stream]


def tokens_of(deltas: Sequence[Delta]) -> Tokens:
    """The tokens of a stream."""
    return tuple(token for delta in deltas for token in delta.tokens)


def stats_of(deltas: Sequence[Delta]) -> list[TokenStats]:
    """The statistics of a stream, which run parallel to its tokens in every delta."""
    assert all(len(delta.stats) == len(delta.tokens) for delta in deltas)
    return [each for delta in deltas for each in delta.stats]


def check(exact: Any, backend: VllmBackend, prompt: Tokens, deltas: Sequence[Delta]) -> None:
    """What a stream reported is what the other implementation computes for the same tokens."""
    tokens, told = tokens_of(deltas), stats_of(deltas)
    expected = computed(exact, prompt, tokens, backend.info.think_close[0])

    assert len(tokens) == len(told) > 0
    for row, each in zip(expected, told, strict=True):
        assert pytest.approx(row, abs=CLOSE, rel=CLOSE) == list(astuple(each))


SAMPLINGS = {
    "greedy": Sampling(temperature=0.0),
    "hot": Sampling(temperature=1.7, top_p=0.7),
    "truncated": Sampling(top_k=3, min_p=0.05),
    "penalties": Sampling(presence_penalty=1.5, frequency_penalty=1.0, repetition_penalty=1.4),
    "bias": Sampling(logit_bias=((40, 100.0), (41, 100.0), (42, -100.0))),
}


def test_statistics_are_those_of_the_raw_logits(portal: BlockingPortal, backend: VllmBackend, exact: Any) -> None:
    """Whatever bends the draw: temperature, truncation, penalties, bias, a forced end of thinking; in one batch."""
    jobs = [
        Job((*PROMPT, 10 + at), 24, sampling, seed=at, stats=True) for at, sampling in enumerate(SAMPLINGS.values())
    ]
    jobs += [
        Job((3, *PROMPT), 24, seed=8, stats=True, thinking_budget=6),
        Job(PROMPT, 24, seed=9, stats=True, logprobs=3),
        Job(PROMPT, 24, seed=10),
    ]

    async def together() -> list[list[Delta]]:
        return await asyncio.gather(*(run(backend, job) for job in jobs))

    streams = portal.call(together)

    for job, deltas in zip(jobs[:-1], streams, strict=False):
        check(exact, backend, job.prompt, deltas)
    assert all(delta.stats == () for delta in streams[-1])
    assert backend.info.think_close[0] in tokens_of(streams[5])[:8]


def test_asking_does_not_change_what_is_drawn(portal: BlockingPortal, backend: VllmBackend) -> None:
    """Token for token, with and without."""
    plain, asked = (
        portal.call(run, backend, Job(PROMPT, 40, Sampling(temperature=0.9), seed=4, stats=stats))
        for stats in (False, True)
    )

    assert tokens_of(plain) == tokens_of(asked)


def test_prompts_in_pieces_shift_nothing(portal: BlockingPortal, backend: VllmBackend, exact: Any) -> None:
    """Passes that end inside a prompt draw no token, report nothing, and use up no random number of a seeded job."""
    per_step = backend._llm.vllm_config.scheduler_config.max_num_batched_tokens
    length = min(backend.info.context - 40, per_step * 2 // 3 + 17)
    count = 2 * per_step // length + 2
    prompts = [tuple(10 + (at * 7 + place * (at + 3)) % 80 for place in range(length)) for at in range(count)]
    jobs = [Job(prompt, 12, seed=at, stats=True) for at, prompt in enumerate([PROMPT, *prompts])]

    async def together() -> list[list[Delta]]:
        first = asyncio.ensure_future(run(backend, jobs[0]))
        return [*await asyncio.gather(*(run(backend, job) for job in jobs[1:])), await first]

    *streams, first = portal.call(together)

    check(exact, backend, PROMPT, first)
    for prompt, deltas in zip(prompts, streams, strict=True):
        check(exact, backend, prompt, deltas)
    assert tokens_of(streams[1]) == tokens_of(portal.call(run, backend, jobs[2]))


def test_neighbours_that_leave_take_nothing_along(portal: BlockingPortal, backend: VllmBackend, exact: Any) -> None:
    """Requests are aborted and begun while others write; rows move, statistics stay with their request."""
    lasting = [Job((*PROMPT, 20 + at), 60, seed=at, stats=True) for at in range(4)]

    async def leave(seed: int) -> None:
        async with backend.engine("leaving").generate(Job(PROMPT, 400, seed=seed, stats=seed % 2 == 0)) as stream:
            read = 0
            async for delta in stream:
                read += len(delta.stats) if seed % 2 == 0 else len(delta.tokens)
                if read >= 3 + seed:
                    break

    async def together() -> list[list[Delta]]:
        leaving = [asyncio.ensure_future(leave(seed)) for seed in range(6)]
        streams = await asyncio.gather(*(run(backend, job) for job in lasting))
        await asyncio.gather(*leaving)
        return streams

    for job, deltas in zip(lasting, portal.call(together), strict=True):
        check(exact, backend, job.prompt, deltas)


def test_every_end_of_a_stream_has_its_statistics(portal: BlockingPortal, backend: VllmBackend, exact: Any) -> None:
    """The delta that carries "stop" or "length" as well; a stop string, a stop token, the end of sequence."""
    (first,), (second,) = backend.engine("t").encode("1"), backend.engine("t").encode("2")
    only = Sampling(logit_bias=((first, 100.0), (second, 100.0)))
    jobs = [
        Job(PROMPT, 5, only, seed=1, stats=True),
        Job(PROMPT, 300, only, seed=3, stop=("121",), stats=True),
        Job(PROMPT, 300, only, seed=3, stop_tokens=(second,), stats=True),
        Job(PROMPT, 50, Sampling(logit_bias=((backend.info.eos[0], 100.0),)), stats=True),
    ]

    streams = [portal.call(run, backend, job) for job in jobs]

    assert ["length", "stop", "stop", "stop"] == [deltas[-1].finish for deltas in streams]
    for deltas in streams:
        check(exact, backend, PROMPT, deltas)


def test_a_chain_reports_across_its_segments(portal: BlockingPortal, backend: VllmBackend, exact: Any) -> None:
    """Tokens of ours between segments have no statistics, and shift none."""

    async def scenario() -> list[tuple[Tokens, list[Delta]]]:
        parts = []
        async with backend.engine("chain").chain(Job(PROMPT, 60, seed=2, stats=True)) as chain:
            for _ in range(3):
                before = PROMPT + chain.tokens
                async with chain.segment(9) as stream:
                    parts.append((before, [delta async for delta in stream]))
                chain.inject((30, 31))
        return parts

    for prompt, deltas in portal.call(scenario):
        check(exact, backend, prompt, deltas)


@pytest.mark.parametrize(("name", "options"), [("self-certainty", {"k": 3}), ("think-brake", {"tau": 10.0})])
def test_strategies_run_on_what_the_engine_says(
    portal: BlockingPortal, backend: VllmBackend, name: str, options: dict[str, Any]
) -> None:
    """On the embedded model: certainties differ from chain to chain, and a wide brake shortens thinking."""
    prompt = backend.engine("p").encode("12+34")

    async def scenario() -> tuple[Any, Any, Any]:
        task = Task((*prompt, *backend.info.think_open), 120, seed=3)
        answer, out = await play(name, backend.engine("strategy"), task, **options)
        plain, _ = await play("single", backend.engine("plain"), task)
        return answer, out, plain

    answer, out, plain = portal.call(scenario)

    assert answer.tokens == out.tokens
    if name == "think-brake":
        assert len(answer.tokens) <= len(plain.tokens)
