"""ResubmittedChain: a chain out of jobs."""

from __future__ import annotations

import pytest

from thinkserve.strategies.controls import Guide, Steer
from thinkserve.strategies.engine import Chain, Job, Tokens
from thinkserve.strategies.seeds import chain_seed
from thinkserve.strategies.testing import ScriptedEngine

pytestmark = pytest.mark.anyio


async def advance(chain: Chain, max_tokens: int, until: Tokens = ()) -> str | None:
    """Run one segment to its end; how it finished."""
    finish = None
    async with chain.segment(max_tokens, until) as stream:
        async for delta in stream:
            finish = delta.finish
    return finish


async def test_segments_and_injections_make_one_text() -> None:
    """Segments go on where the last one ended; our tokens lie between them."""
    engine = ScriptedEngine(["one two"])

    async with engine.chain(Job(engine.encode("q"), 99, seed=1)) as chain:
        ends = [await advance(chain, 3)]
        chain.inject(engine.encode("[ours]"))
        ends.append(await advance(chain, 99))

    assert ["length", "stop"] == ends
    assert engine.encode("one[ours] two<eos>") == chain.tokens
    assert 8 == engine.generated


async def test_until_tokens_end_a_segment_and_are_kept() -> None:
    """`until` adds to the job's own stop tokens."""
    engine = ScriptedEngine(["ab\ncd"])

    async with engine.chain(Job((9,), 99)) as chain:
        finish = await advance(chain, 99, until=engine.encode("\n"))

    assert ("stop", "ab\n") == (finish, engine.decode(chain.tokens))


async def test_max_tokens_bounds_all_segments_together() -> None:
    """Injected tokens are free, generated ones count; a spent chain ends at once."""
    engine = ScriptedEngine(["abcdefgh"])

    async with engine.chain(Job((9,), 4)) as chain:
        await advance(chain, 3)
        chain.inject(engine.encode("xyz"))
        ends = [await advance(chain, 3), await advance(chain, 3)]

    assert ["length", "length"] == ends
    assert "abcxyzd" == engine.decode(chain.tokens)
    assert 4 == engine.generated


async def test_unread_tokens_cost_but_do_not_enter_the_chain() -> None:
    """Leaving a segment early drops what was not read; the budget knows it all the same."""
    engine = ScriptedEngine(["abcdefgh"], overrun=2)

    async with engine.chain(Job((9,), 6)) as chain:
        async with chain.segment(6) as stream:
            await anext(stream)
        await advance(chain, 6)

    assert "abcd" == engine.decode(chain.tokens)
    assert 6 == engine.generated


@pytest.mark.parametrize(("tag", "since"), [("", 0), ("<think>", 1)])
async def test_a_thinking_budget_spans_segments(tag: str, since: int) -> None:
    """What one segment has thought is not given to the next again; a tag that the model writes itself is no thought."""
    engine = ScriptedEngine([f"{tag}thinking</think>answer"])
    prompt = engine.encode("q" if tag else "q<think>")

    async with engine.chain(Job(prompt, 99, thinking_budget=5, since=since)) as chain:
        await advance(chain, 3)
        await advance(chain, 99)

    assert engine.encode(f"{tag}think</think>answer<eos>") == chain.tokens


async def test_guidance_aims_at_what_is_left_of_its_budget() -> None:
    """Each segment is guided to the budget less what was written; steering stays as it is."""
    engine = ScriptedEngine(["one two three"])
    steer = Steer("brief", 0.5)

    async with engine.chain(Job(engine.encode("q"), 99, seed=1, controls=(Guide(10), steer))) as chain:
        for _ in range(3):
            await advance(chain, 4)

    assert [(Guide(10), steer), (Guide(6), steer), (Guide(2), steer)] == [s.job.controls for s in engine.history]
    assert Guide(1) == Guide(3).later(7)


async def test_segments_draw_different_random_numbers() -> None:
    """Each segment has a seed of its own, the same in every run."""
    engine = ScriptedEngine(["abcdefgh"])
    for _ in range(2):
        async with engine.chain(Job((9,), 99, seed=5)) as chain:
            await advance(chain, 2)
            await advance(chain, 2)

    seeds = [stream.job.seed for stream in engine.history]

    assert seeds[:2] == seeds[2:]
    assert seeds[0] != seeds[1]
    # Indices from 0 on are those of chains, nodes and jobs in parts.
    assert not {chain_seed(5, index) for index in range(64)} & set(seeds)


async def test_two_chains_write_two_scripts() -> None:
    """Segments of chains that take turns do not mix."""
    engine = ScriptedEngine(["aaaa", "aabb"])

    async with engine.chain(Job((9,), 99)) as one, engine.chain(Job((9,), 99)) as two:
        for chain in (one, two, one, two):
            await advance(chain, 2)

    assert ["aaaa", "aabb"] == [engine.decode(one.tokens), engine.decode(two.tokens)]


async def test_dropped_tokens_are_no_prompt_to_the_next_segment() -> None:
    """They are written anew, or give way to ours; what was generated stays counted."""
    engine = ScriptedEngine(["one two"])

    async with engine.chain(Job(engine.encode("q"), 99, seed=1)) as chain:
        await advance(chain, 5)
        chain.drop(2)
        chain.drop(0)
        chain.inject(engine.encode("!"))
        await advance(chain, 99)

    assert engine.encode("one! two<eos>") == chain.tokens
    assert len("one t") + len(" two") + 1 == engine.generated
