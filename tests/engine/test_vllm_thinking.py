"""The thinking budget is exact, and the rendered prompt says truly where generation starts."""

from __future__ import annotations

import asyncio
from typing import Any

import anyio
import pytest
from anyio.from_thread import BlockingPortal

from thinkserve.server.plan import Rendered
from thinkserve.server.vllm_engine import VllmBackend
from thinkserve.strategies.engine import Job, Sampling, Tokens
from thinkserve.strategies.errors import BadOptions, TooLong

QUESTION = [{"role": "user", "content": "3 + 4 = ?"}]


def never(backend: VllmBackend) -> Sampling:
    """Sampling that neither ends the text nor writes a tag by itself."""
    info = backend.info
    return Sampling(logit_bias=tuple((token, -100.0) for token in (*info.eos, *info.think_open, *info.think_close)))


async def run(backend: VllmBackend, prompt: Tokens, budget: int | None, max_tokens: int = 40, seed: int = 0) -> Tokens:
    """The tokens of a chain that would never stop thinking."""
    job = Job(prompt, max_tokens, never(backend), seed=seed, thinking_budget=budget)
    async with backend.engine("thinking").generate(job) as stream:
        return tuple([token async for delta in stream for token in delta.tokens])


def closings(backend: VllmBackend, tokens: Tokens) -> list[int]:
    """Where the closing tag stands."""
    return [index for index, token in enumerate(tokens) if (token,) == backend.info.think_close]


@pytest.mark.parametrize("budget", [0, 1, 2, 20, 39])
def test_the_end_of_thinking_is_forced_after_exactly_the_budget(
    portal: BlockingPortal, backend: VllmBackend, budget: int
) -> None:
    """The prompt has opened the think block, with or without text behind the tag; that text does not count."""

    async def scenario() -> None:
        opened = (5, 6, *backend.info.think_open)
        prompts = (
            opened,
            (*opened, 40),
            (*opened, *range(40, 60)),
            (*opened, 40, *backend.info.think_close, *opened),
        )
        chains = await asyncio.gather(*(run(backend, prompt, budget) for prompt in prompts))
        assert [closings(backend, chain) for chain in chains] == [[budget]] * len(prompts)

    portal.call(scenario)


@pytest.mark.parametrize("budget", [40, 1000, None])
def test_a_budget_that_is_not_reached_changes_nothing(
    portal: BlockingPortal, backend: VllmBackend, budget: int | None
) -> None:
    """The same tokens as without a budget, and no closing tag."""

    async def scenario() -> None:
        prompt = (5, 6, *backend.info.think_open)
        assert await run(backend, prompt, budget) == await run(backend, prompt, None)
        assert closings(backend, await run(backend, prompt, budget)) == []

    portal.call(scenario)


def test_nothing_is_forced_outside_thinking(portal: BlockingPortal, backend: VllmBackend) -> None:
    """After a closed block, or without one, the budget has nothing to end."""

    async def scenario() -> None:
        for prompt in ((5, 6), (5, *backend.info.think_open, 6, *backend.info.think_close, 7)):
            assert closings(backend, await run(backend, prompt, 5)) == []

    portal.call(scenario)


def test_chains_of_one_batch_have_budgets_of_their_own(portal: BlockingPortal, backend: VllmBackend) -> None:
    """Thirty chains side by side, each with another budget and another end."""

    async def scenario() -> None:
        prompt = (5, 6, *backend.info.think_open)
        chains = await asyncio.gather(
            *(run(backend, prompt, budget, max_tokens=31 + budget % 7, seed=budget) for budget in range(30))
        )
        assert [closings(backend, chain) for chain in chains] == [[budget] for budget in range(30)]

    portal.call(scenario)


def test_a_chain_keeps_its_budget_over_segments(portal: BlockingPortal, backend: VllmBackend) -> None:
    """Segments of seven tokens: thinking ends after twelve, and the chain's own limit ends it after thirty."""

    async def scenario() -> None:
        job = Job((5, 6, *backend.info.think_open), 30, never(backend), seed=2, thinking_budget=12)
        async with backend.engine("chain").chain(job) as chain:
            for _ in range(5):
                async with chain.segment(7) as stream:
                    finish = [delta.finish async for delta in stream][-1]
                    assert finish == "length"
        assert len(chain.tokens) == 30
        assert closings(backend, chain.tokens) == [12]

    portal.call(scenario)


def render(portal: BlockingPortal, backend: VllmBackend, messages: list[dict[str, Any]], **more: Any) -> Rendered:
    """Render through the portal."""
    return portal.call(lambda: backend.render(messages, **more))


@pytest.mark.parametrize("thinking", [True, False, None])
def test_the_phase_is_where_the_prompt_ends(
    portal: BlockingPortal, backend: VllmBackend, thinking: bool | None
) -> None:
    """Open tag: thinking. Closed tag: answer. No tag at the end: the model decides. Off means answer, always."""
    rendered = render(portal, backend, QUESTION, thinking=thinking)
    text = backend.engine("text").decode(rendered.tokens)
    open_tag, close_tag = (
        backend.engine("text").decode(tag) for tag in (backend.info.think_open, backend.info.think_close)
    )
    assert "3 + 4" in text.replace("3+4", "3 + 4")
    assert rendered.phase == ("answer" if thinking is False else rendered.phase)
    ends = {"thinking": open_tag, "answer": close_tag}
    assert rendered.phase is None or text.rstrip().endswith(ends[rendered.phase])


def test_a_tag_inside_a_message_is_not_a_phase(portal: BlockingPortal, backend: VllmBackend) -> None:
    """A user who writes tags does not change where generation starts."""
    plain = render(portal, backend, QUESTION)
    for text in ("<think>", "</think>", "<think>a</think>"):
        assert render(portal, backend, [{"role": "user", "content": text}]).phase == plain.phase


def test_content_parts_render_as_their_text(portal: BlockingPortal, backend: VllmBackend) -> None:
    """A list of one text part is the text."""
    parts = [{"role": "user", "content": [{"type": "text", "text": QUESTION[0]["content"]}]}]
    assert render(portal, backend, parts) == render(portal, backend, QUESTION)


@pytest.mark.parametrize(
    "kwargs",
    [{"chat_template": "x"}, {"tokenize": True}, {"no_such_argument": 1}, {"enable_thinking": {"a": 1}}, {"tools": []}],
)
def test_an_argument_that_the_template_must_not_get_is_refused(
    portal: BlockingPortal, backend: VllmBackend, kwargs: dict[str, Any]
) -> None:
    """Named in the error as the client wrote it."""
    with pytest.raises(BadOptions) as caught:
        render(portal, backend, QUESTION, kwargs=kwargs)
    assert caught.value.param == f"chat_template_kwargs.{next(iter(kwargs))}"


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb"])
def test_half_a_surrogate_pair_is_refused(portal: BlockingPortal, backend: VllmBackend, text: str) -> None:
    """In messages and in plain text."""
    with pytest.raises(BadOptions):
        render(portal, backend, [{"role": "user", "content": text}])
    with pytest.raises(BadOptions):
        backend.engine("text").encode(text)


def test_a_prompt_beyond_the_context_is_refused(portal: BlockingPortal, backend: VllmBackend) -> None:
    """With the number of its tokens."""
    with pytest.raises(TooLong) as caught:
        render(portal, backend, [{"role": "user", "content": "7" * backend.info.context}])
    assert caught.value.tokens > backend.info.context == caught.value.context


def test_a_huge_message_does_not_block_the_event_loop(portal: BlockingPortal, backend: VllmBackend) -> None:
    """Four megabytes are refused while other tasks of the loop wait less than 100 ms for their turn."""
    gaps: list[float] = []

    async def tick() -> None:
        last = anyio.current_time()
        while True:
            await anyio.sleep(0.001)
            last, gap = anyio.current_time(), anyio.current_time() - last
            gaps.append(gap)

    async def scenario() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(tick)
            with pytest.raises(TooLong):
                await backend.render([{"role": "user", "content": "7 " * 2**21}])
            group.cancel_scope.cancel()

    for _ in range(3):
        gaps.clear()
        portal.call(scenario)
        if gaps and max(gaps) < 0.1:
            return
    raise AssertionError(f"The event loop stood still for {max(gaps):.3f} s")
