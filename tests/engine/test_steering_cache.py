"""The prefix cache under steering: nobody computes on blocks that were steered otherwise; what is equal is shared."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from anyio.from_thread import BlockingPortal

from thinkserve.server.vectors import SteeringVector
from thinkserve.server.vllm_cache_key import block_key
from thinkserve.server.vllm_controls import NOTHING, Entry, Steered
from thinkserve.server.vllm_engine import VllmBackend
from thinkserve.strategies.engine import Job, Sampling, Tokens

PROMPT: Tokens = tuple(20 + (7 * n) % 60 for n in range(300))
CLOSE = 9


@pytest.fixture(scope="module")
def steered(make_vector: Callable[..., SteeringVector]) -> Callable[..., Steered]:
    """The steering from a position on, with a strength."""
    vector = make_vector("v", 11, (2,))

    def make(start: int, scale: float = 1.0) -> Steered:
        entry = Entry(vector.id, scale, start, None, -1, 0)
        return Steered((entry,), {vector.id: {"2": vector.layers[2]}})

    return make


def job(backend: VllmBackend, prompt: Tokens, tokens: int = 40) -> Job:
    """A greedy job of exactly `tokens` tokens."""
    bias = tuple((token, -100.0) for token in backend.info.eos)
    return Job(prompt, tokens, Sampling(temperature=0.0, logit_bias=bias), logprobs=0)


@pytest.mark.parametrize(
    ("first", "then", "cached"),
    [
        pytest.param(None, (0, 1.0), 0, id="unsteered, then steered from the first token"),
        pytest.param(None, (299, 1.0), 288, id="unsteered, then steered from the last prompt token"),
        pytest.param((299, 1.0), None, 288, id="steered, then the same prompt unsteered"),
        pytest.param((0, 1.0), (0, 2.0), 0, id="the same vector, another strength"),
        pytest.param((0, 1.0), (0, 1.0), 288, id="the same steering"),
        pytest.param((64, 1.0), (299, 1.0), 64, id="steered from the middle, then from the end"),
    ],
)
def test_a_prompt_is_found_under_its_own_steering_only(
    portal: BlockingPortal,
    backend: VllmBackend,
    run_batch: Callable[..., Any],
    steered: Callable[..., Steered],
    first: tuple[int, float] | None,
    then: tuple[int, float] | None,
    cached: int,
) -> None:
    """The second of two requests over one prompt says what it says on an empty cache."""
    salt = f"{first} {then}"

    async def scenario() -> Any:
        one, two = (NOTHING if how is None else steered(*how) for how in (first, then))
        await run_batch(backend, [job(backend, PROMPT)], [one], salt=salt)
        (warm,) = await run_batch(backend, [job(backend, PROMPT)], [two], salt=salt)
        (cold,) = await run_batch(backend, [job(backend, PROMPT)], [two])
        return warm, cold

    warm, cold = portal.call(scenario)

    assert (cached, 0) == (warm.cached, cold.cached)
    assert cold.tokens == warm.tokens
    assert pytest.approx(cold.logprobs, abs=1e-5) == warm.logprobs


def test_an_unsteered_request_over_a_steered_chain_computes_the_chain_anew(
    portal: BlockingPortal, backend: VllmBackend, run_batch: Callable[..., Any], steered: Callable[..., Steered]
) -> None:
    """Its prompt is shared, its tokens, which were steered when they were generated, are not."""

    async def scenario() -> Any:
        (chain,) = await run_batch(backend, [job(backend, PROMPT)], [steered(299)], salt="chain")
        longer = job(backend, PROMPT + chain.tokens)
        (warm,) = await run_batch(backend, [longer], salt="chain")
        (cold,) = await run_batch(backend, [longer])
        (again,) = await run_batch(backend, [longer], [steered(299)], salt="chain")
        return warm, cold, again

    warm, cold, again = portal.call(scenario)

    assert (288, 0, 320) == (warm.cached, cold.cached, again.cached)
    assert pytest.approx(cold.logprobs, abs=1e-5) == warm.logprobs
    assert again.logprobs != warm.logprobs


def request(entries: list[list[Any]], tokens: list[int]) -> Any:
    """What the key looks at."""
    params = SimpleNamespace(extra_args={"thinkserve": {"steer": entries}} if entries else None)
    return SimpleNamespace(sampling_params=params, _all_token_ids=tokens)


@pytest.mark.parametrize(
    ("entry", "keys"),
    [
        ([], [None, None, None]),
        (["v", 1.0, 5, None, -1, 0], [None, (("v", 1.0, 0, 1, 4),), (("v", 1.0, 0, 0, 4),)]),
        (["v", 1.0, 4, 6, -1, 0], [None, (("v", 1.0, 0, 0, 2),), None]),
        (["v", 1.0, 3, None, CLOSE, 1], [(("v", 1.0, 1, 3, 4),), (("v", 1.0, 1, 0, 2),), None]),
        (["v", 1.0, 6, None, CLOSE, 1], [None, (("v", 1.0, 1, 2, 4),), (("v", 1.0, 1, 0, 4),)]),
    ],
    ids=["none", "open", "closed", "until thinking ends", "after thinking has ended"],
)
def test_a_block_is_keyed_by_what_acted_on_its_own_tokens(entry: list[Any], keys: list[Any]) -> None:
    """Three blocks of four tokens, the end of thinking at position 6, asked for as the tokens come."""
    asked = request([entry] if entry else [], [])
    found = []
    for block in range(3):
        asked._all_token_ids += [1, 2, CLOSE if block == 1 else 3, 4]
        found.append(block_key(asked, 4 * block, 4 * block + 4))

    assert keys == found


def test_a_session_hashes_new_tokens_under_its_new_steering() -> None:
    """vLLM hashes a session's new blocks before it takes the new parameters; ours is the other way round."""
    from vllm.sampling_params import SamplingParams
    from vllm.utils.hashing import sha256_cbor
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.request import Request, RequestStatus, StreamingUpdate

    from thinkserve.server import vllm_cache_key, vllm_scheduler

    init_none_hash(sha256_cbor)
    vllm_cache_key.install()
    hasher = get_request_block_hasher(4, sha256_cbor)

    def params(*entry: Any) -> SamplingParams:
        return SamplingParams(max_tokens=8, extra_args={"thinkserve": {"steer": [list(entry)]}} if entry else None)

    old, new = params("v", 1.0, 3, None, CLOSE, 0), params("v", 1.0, 3, 5, -1, 0)
    session = Request("s", [1, 2, 3, 4, 5], old, None, block_hasher=hasher, resumable=True)
    session.num_computed_tokens, session.status = 5, RequestStatus.WAITING_FOR_STREAMING_REQ
    scheduler = object.__new__(vllm_scheduler.Scheduler)
    vars(scheduler).update(hash_block_size=4, num_waiting_for_streaming_input=1, log_stats=False)
    scheduler._update_request_as_session(session, StreamingUpdate(None, [6, 7, 8, CLOSE], 8, 0.0, new))

    fresh = Request("f", [1, 2, 3, 4, 5, 6, 7, 8, CLOSE], new, None, block_hasher=hasher)
    assert fresh.block_hashes == session.block_hashes
    assert len(fresh.block_hashes) == 2
