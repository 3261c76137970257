"""What a remote server says of numbers is checked where it arrives: no line of its can upset what reads it."""

from __future__ import annotations

import json
import math

import pytest

from thinkserve.server.remote_wire import Chunk, Malformed, chunk
from thinkserve.strategies.engine import Job

JOB = Job((5, 6, 7), 100, logprobs=1)


def read(sampled: str, listed: str = "-1.0") -> Chunk:
    """A chunk of one token with these log-probabilities."""
    logprobs = f'{{"token_logprobs": [{sampled}], "top_logprobs": [{{"token_id:7": {listed}}}]}}'
    return chunk(f'{{"choices": [{{"token_ids": [7], "logprobs": {logprobs}}}]}}'.encode(), JOB, 0)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "0.5", "1" + "0" * 400, "true", "null", '"-1"'])
def test_what_is_no_log_probability_is_malformed(value: str) -> None:
    """Of the token that was drawn, and of an alternative."""
    for given in ((value,), ("-1.0", value)):
        with pytest.raises(Malformed, match="no log-probability"):
            read(*given)


@pytest.mark.parametrize("value", ["-9999.0", "-1e300", "-1" + "0" * 400])
def test_what_is_least_is_minus_infinity(value: str) -> None:
    """However it is written."""
    assert ((-math.inf,), (((7, -math.inf),),)) == (read(value, value).logprobs, read(value, value).top)


def test_certainty_may_be_rounded() -> None:
    """A sum of floats may come out above 1 by a little; whole numbers are numbers."""
    assert ((1e-6,), (((7, 0.0),),)) == (read("1e-6", "0").logprobs, read("1e-6", "0").top)


@pytest.mark.parametrize(
    ("told", "cached"), [(0, 0), (3, 3), (4, 3), (10**400, 3), (-1, None), (2.0, None), (True, None)]
)
def test_no_more_of_a_prompt_is_cached_than_there_is(told: object, cached: int | None) -> None:
    """What is no count says nothing."""
    usage = {"completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": told}}

    assert cached == chunk(json.dumps({"choices": [], "usage": usage}).encode(), JOB, 0).cached
