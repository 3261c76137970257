"""Every field of a Job reaches vLLM with the meaning that the protocol gives it, or is refused before it gets there."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from anyio.from_thread import BlockingPortal

from thinkserve.server.vllm_engine import VllmBackend
from thinkserve.strategies.engine import Control, Delta, Job, Role, Sampling, Tokens
from thinkserve.strategies.errors import BadOptions, TooLong, Unsupported

PROMPT: Tokens = (5, 6, 7, 8, 9)


async def run(backend: VllmBackend, job: Job, salt: str | None = None) -> list[Delta]:
    """All deltas of a job."""
    async with backend.engine("sampling", salt).generate(job) as stream:
        return [delta async for delta in stream]


def tokens(deltas: list[Delta]) -> Tokens:
    """The tokens of a whole stream."""
    return tuple(token for delta in deltas for token in delta.tokens)


def only(*allowed: int) -> Sampling:
    """Sampling that draws one of `allowed`, for all practical purposes."""
    return Sampling(logit_bias=tuple((token, 100.0) for token in allowed))


def test_finish_is_on_the_last_delta_and_only_there(portal: BlockingPortal, backend: VllmBackend) -> None:
    """A job that runs out of tokens ends with "length" after exactly max_tokens."""
    deltas = portal.call(run, backend, Job(PROMPT, 20, only(40, 41)))
    assert [delta.finish for delta in deltas] == [None] * (len(deltas) - 1) + ["length"]
    assert len(tokens(deltas)) == 20


def test_a_stop_token_ends_the_job_and_stays(portal: BlockingPortal, backend: VllmBackend) -> None:
    """The stop token is the last token of the stream."""
    deltas = portal.call(run, backend, Job(PROMPT, 200, only(40, 41), seed=1, stop_tokens=(41,)))
    assert deltas[-1].finish == "stop"
    assert tokens(deltas).index(41) == len(tokens(deltas)) - 1


def test_end_of_sequence_ends_the_job(portal: BlockingPortal, backend: VllmBackend) -> None:
    """Each of the model's end tokens stops generation without being asked for."""
    for eos in backend.info.eos:
        deltas = portal.call(run, backend, Job(PROMPT, 50, only(eos)))
        assert (tokens(deltas), deltas[-1].finish) == ((eos,), "stop")


def test_a_stop_string_ends_the_job_and_stays(portal: BlockingPortal, backend: VllmBackend) -> None:
    """Generation ends with the token that completes the string, which is kept."""
    engine = backend.engine("text")
    (first,), (second,) = engine.encode("1"), engine.encode("2")
    deltas = portal.call(run, backend, Job(PROMPT, 300, only(first, second), seed=3, stop=("121",)))
    text = engine.decode(tokens(deltas))
    assert deltas[-1].finish == "stop"
    assert text.index("121") == len(text) - 3


def test_the_same_seed_draws_the_same_tokens(portal: BlockingPortal, backend: VllmBackend) -> None:
    """Seeded jobs repeat, side by side too; another seed or none gives other tokens."""

    async def scenario() -> None:
        endless = Sampling(logit_bias=tuple((eos, -100.0) for eos in backend.info.eos))
        jobs = [Job(PROMPT, 30, endless, seed=seed) for seed in (7, 7, 8, None)]
        first, again, other, unseeded = [tokens(await run(backend, job)) for job in jobs]
        together = await asyncio.gather(*(run(backend, job) for job in jobs))
        assert first == again == tokens(together[0])
        assert len({first, other, unseeded, tokens(together[3])}) == 4

    portal.call(scenario)


@pytest.mark.parametrize(
    "sampling",
    [Sampling(temperature=0.0), Sampling(top_k=1), Sampling(top_p=1e-6), Sampling(min_p=1.0)],
    ids=["temperature", "top_k", "top_p", "min_p"],
)
def test_each_truncation_alone_can_make_sampling_greedy(
    portal: BlockingPortal, backend: VllmBackend, sampling: Sampling
) -> None:
    """At its limit each of the four draws the most likely token every time, whatever the seed."""
    expected = tokens(portal.call(run, backend, Job(PROMPT, 25, Sampling(temperature=0.0))))
    assert tokens(portal.call(run, backend, Job(PROMPT, 25, sampling, seed=5))) == expected


@pytest.mark.parametrize(
    "penalty", [{"presence_penalty": 2.0}, {"frequency_penalty": 2.0}, {"repetition_penalty": 5.0}]
)
def test_each_penalty_changes_a_repeating_chain(
    portal: BlockingPortal, backend: VllmBackend, penalty: dict[str, Any]
) -> None:
    """Two tokens are equally favoured by a small margin; a penalty makes the greedy chain leave the first one."""
    sampling = Sampling(temperature=0.0, logit_bias=((40, 60.0), (41, 59.0)))
    plain = tokens(portal.call(run, backend, Job(PROMPT, 40, sampling)))
    assert tokens(portal.call(run, backend, Job(PROMPT, 40, replace(sampling, **penalty)))) != plain


def test_log_probabilities_come_only_when_asked_for(portal: BlockingPortal, backend: VllmBackend) -> None:
    """None: no numbers. 0: one per sampled token. n: also the n best, best first; greedy sampling draws the first."""

    async def scenario() -> None:
        plain, sampled, best = [
            await run(backend, Job(PROMPT, 12, Sampling(temperature=0.0), logprobs=count)) for count in (None, 0, 3)
        ]
        assert tokens(plain) == tokens(sampled) == tokens(best)
        assert all(delta.logprobs == () == delta.top for delta in plain)
        assert all(len(delta.logprobs) == len(delta.tokens) and delta.top == () for delta in sampled)
        for delta in best:
            for token, logprob, top in zip(delta.tokens, delta.logprobs, delta.top, strict=True):
                assert len(top) == 3
                assert top[0] == (token, logprob)
                assert [value for _, value in top] == sorted((value for _, value in top), reverse=True)

    portal.call(scenario)


def test_prefixes_are_shared_within_a_salt_only(portal: BlockingPortal, backend: VllmBackend) -> None:
    """The second job on a prompt finds it in the cache; under another salt, or none, it does not."""
    prompt = tuple(10 + index % 80 for index in range(200))

    async def cached(salt: str | None) -> int:
        async with backend.engine("cache", salt).generate(Job(prompt, 1)) as stream:
            await anext(stream)
        return stream.cached

    async def scenario() -> None:
        assert [await cached(salt) for salt in ("a", "a", "b", None, None)] == [0, 192, 0, 0, 192]

    portal.call(scenario)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=-1.0),
        Sampling(temperature=float("nan")),
        Sampling(top_p=0.0),
        Sampling(top_k=-5),
        Sampling(min_p=2.0),
        Sampling(presence_penalty=3.0),
        Sampling(repetition_penalty=0.0),
        Sampling(logit_bias=((10**6, 1.0),)),
    ],
    ids=str,
)
def test_a_value_out_of_range_is_refused(portal: BlockingPortal, backend: VllmBackend, sampling: Sampling) -> None:
    """The job is refused before the engine process sees it, and nothing stays behind."""
    with pytest.raises(BadOptions):
        portal.call(run, backend, Job(PROMPT, 5, sampling))
    assert backend.unfinished == 0


@pytest.mark.parametrize(
    ("job", "error"),
    [
        (Job((), 5), BadOptions),
        (Job((10**7,), 5), BadOptions),
        (Job((-1,), 5), BadOptions),
        (Job(PROMPT, 0), BadOptions),
        (Job(PROMPT, 5, stop=("",)), BadOptions),
        (Job(PROMPT, 5, logprobs=-3), BadOptions),
        (Job(PROMPT, 5, logprobs=10**6), BadOptions),
        (Job(PROMPT, 5, thinking_budget=-1), BadOptions),
        (Job(PROMPT * 10_000, 5), TooLong),
        (Job(PROMPT, 5, role="reward"), Unsupported),
        (Job(PROMPT, 5, controls=(Control(),)), Unsupported),
    ],
)
def test_a_job_that_cannot_run_is_refused(
    portal: BlockingPortal, backend: VllmBackend, job: Job, error: type[Exception]
) -> None:
    """Each with the error of its kind, and nothing stays behind."""
    with pytest.raises(error):
        portal.call(run, backend, job)
    assert backend.unfinished == 0


@pytest.mark.parametrize("role", ["guide", "reward", "verifier"])
def test_a_role_without_a_model_is_unsupported(backend: VllmBackend, role: Role) -> None:
    """Whatever is asked of it."""
    engine = backend.engine("roles")
    for ask in (engine.info, engine.detokenizer):
        with pytest.raises(Unsupported):
            ask(role)
    with pytest.raises(Unsupported):
        engine.encode("text", role)


def test_a_job_is_clamped_to_the_context(portal: BlockingPortal, backend: VllmBackend) -> None:
    """A prompt that leaves room for three tokens gets three and ends with "length"."""
    prompt = tuple(40 + index % 9 for index in range(backend.info.context - 3))
    deltas = portal.call(run, backend, Job(prompt, 50, only(40, 41)))
    assert (len(tokens(deltas)), deltas[-1].finish) == (3, "length")
