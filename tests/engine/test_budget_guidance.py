"""Budget guidance on the real engine: the distribution is the paper's at every line start, and nothing else changes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import anyio
import pytest
import torch
from anyio.from_thread import BlockingPortal

from thinkserve.guidance.checkpoint import About, load
from thinkserve.guidance.predictor import Predictor
from thinkserve.kernels.guide import guide
from thinkserve.server.model_dir import find_model
from thinkserve.server.settings import Settings
from thinkserve.server.vllm_engine import VllmBackend
from thinkserve.server.vllm_guidance import find_predictor
from thinkserve.strategies.controls import Guide
from thinkserve.strategies.engine import Job, Sampling, Task, Tokens
from thinkserve.strategies.testing import play
from thinkserve.strategies.text import Phases
from thinkserve.train.tasks import problems

ALTERNATIVES = 20
# Less likely than this, an alternative's log-probability may differ by rounding.
LIKELY = -8.0


class Reference:
    """The embedded model in Hugging Face, with its predictor."""

    def __init__(self) -> None:
        from transformers import AutoModelForCausalLM

        model = find_model(None)
        folder = find_predictor(Settings(), model)
        if folder is None:
            raise AssertionError("The embedded model has no predictor: thinkserve budget train --tasks 1500")
        self.predictor: Predictor
        self.about: About
        self.predictor, self.about = load(folder)
        self.folder: Path = folder
        self.model: Any = AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.float32).eval()

    @torch.no_grad()
    def distributions(self, prompt: Tokens, written: Tokens, budget: int) -> Iterator[tuple[torch.Tensor, bool]]:
        """For each token of `written` the log-probabilities it was drawn from, [vocabulary], and if they are guided."""
        out = self.model(torch.tensor([prompt + written]), output_hidden_states=True)
        states = torch.stack(out.hidden_states, 2)[0]
        thinking = True
        for index, token in enumerate(written):
            at = len(prompt) + index - 1
            raw = out.logits[0, at : at + 1].float()
            guided = thinking and (index == 0 or written[index - 1] in self.about.newlines)
            if guided:
                remaining = torch.tensor([max(1.0, budget - index)])
                alpha, rate = self.predictor(states[at : at + 1])
                yield guide(raw, alpha, rate, remaining, lam_min=self.about.lam_min)[0], True
            else:
                yield raw.log_softmax(-1)[0], False
            thinking &= token != self.about.close


@pytest.fixture(scope="module")
def reference() -> Reference:
    """Loaded once."""
    return Reference()


def prompts(backend: VllmBackend, portal: BlockingPortal, count: int) -> list[Tokens]:
    """Fresh problems of the evaluation split, rendered."""
    questions = [[{"role": "user", "content": p.question}] for p in problems("medium", count, seed=5)]
    return [portal.call(backend.render, question).tokens for question in questions]


async def tokens_of(backend: VllmBackend, job: Job) -> Tokens:
    """All that a job writes."""
    async with backend.engine("guided").generate(job) as stream:
        return tuple([token async for delta in stream for token in delta.tokens])


async def all_of(backend: VllmBackend, jobs: list[Job]) -> list[Tokens]:
    """Run jobs side by side."""
    found: dict[int, Tokens] = {}

    async def one(index: int) -> None:
        found[index] = await tokens_of(backend, jobs[index])

    async with anyio.create_task_group() as group:
        for index in range(len(jobs)):
            group.start_soon(one, index)
    return [found[index] for index in range(len(jobs))]


def guided(prompt: Tokens, budget: int | None, seed: int = 0, **more: Any) -> Job:
    """A job towards a budget; None: like any other."""
    controls = () if budget is None else (Guide(budget),)
    return Job(prompt, 400, Sampling(temperature=1.0), seed=seed, controls=controls, **more)


@pytest.mark.parametrize(("budget", "temperature"), [(25, 1.0), (60, 0.5), (60, 1.0), (60, 1.5), (140, 1.0)])
def test_every_token_is_drawn_from_the_distribution_that_hugging_face_computes(
    portal: BlockingPortal, backend: VllmBackend, reference: Reference, budget: int, temperature: float
) -> None:
    """Guided at the first token and after each line break while thinking, the model's own everywhere else.

    Its log-probabilities are those of that distribution, which a temperature does not change.
    """

    async def scenario(prompt: Tokens) -> tuple[Tokens, list[Any]]:
        job = replace(guided(prompt, budget, logprobs=ALTERNATIVES), sampling=Sampling(temperature=temperature))
        async with backend.engine("parity").generate(job) as stream:
            deltas = [delta async for delta in stream]
        return tuple(t for d in deltas for t in d.tokens), [top for d in deltas for top in d.top]

    (prompt,) = prompts(backend, portal, 1)
    written, tops = portal.call(scenario, prompt)
    changed = 0
    for (expected, is_guided), top in zip(reference.distributions(prompt, written, budget), tops, strict=True):
        found = {token: value for token, value in top if value > LIKELY}
        assert found == {token: pytest.approx(float(expected[token]), abs=0.02) for token in found}
        changed += is_guided

    close = reference.about.close
    end = written.index(close) if close in written else len(written) - 1
    assert 1 + sum(token in reference.about.newlines for token in written[:end]) == changed
    assert changed > 2


def test_guided_and_unguided_requests_of_one_batch_equal_their_solo_runs(
    portal: BlockingPortal, backend: VllmBackend, reference: Reference
) -> None:
    """Different budgets, different lengths, requests coming to an end all the time."""
    budgets = (20, None, 60, 120, None, 40, 90, None)
    jobs = [
        guided(prompt, budget, seed)
        for seed, (prompt, budget) in enumerate(zip(prompts(backend, portal, len(budgets)), budgets, strict=True))
    ]

    together = portal.call(all_of, backend, jobs)

    assert [portal.call(tokens_of, backend, job) for job in jobs] == together


def test_a_request_without_guidance_is_bit_identical_beside_guided_ones(
    portal: BlockingPortal, backend: VllmBackend
) -> None:
    """Same neighbours, guided or not, writing as many tokens: the same log-probabilities to the last bit."""
    info = backend.info
    sampling = Sampling(logit_bias=tuple((token, -100.0) for token in (*info.eos, *info.think_close)))
    asked = prompts(backend, portal, 4)

    async def scenario(budget: int | None) -> list[tuple[Tokens, tuple[float, ...]]]:
        async def one(index: int) -> None:
            controls = (Guide(budget),) if budget and index else ()
            job = Job(asked[index], 60, sampling, seed=index, controls=controls, logprobs=0)
            async with backend.engine("bits").generate(job) as stream:
                deltas = [delta async for delta in stream]
            tokens = tuple(t for d in deltas for t in d.tokens)
            found[index] = tokens, tuple(v for d in deltas for v in d.logprobs)

        found: dict[int, tuple[Tokens, tuple[float, ...]]] = {}
        async with anyio.create_task_group() as group:
            for index in range(4):
                group.start_soon(one, index)
        return [found[index] for index in range(4)]

    plain, beside = portal.call(scenario, None), portal.call(scenario, 15)

    assert plain[0] == beside[0]
    assert plain[1:] != beside[1:]


def test_a_smaller_budget_makes_thinking_shorter(
    portal: BlockingPortal, backend: VllmBackend, reference: Reference
) -> None:
    """On average over problems, without any hard end."""
    asked = prompts(backend, portal, 16)

    def mean(budget: int | None) -> float:
        chains = portal.call(all_of, backend, [guided(prompt, budget, seed) for seed, prompt in enumerate(asked)])
        return fmean(thinking(backend, chain) for chain in chains)

    tight, middle, free = mean(30), mean(75), mean(None)

    assert tight < middle < free


def thinking(backend: VllmBackend, written: Tokens) -> int:
    """Thinking tokens of a chain."""
    phases = Phases(backend.info, "thinking")
    phases.push(written)
    return phases.length


def test_the_strategy_ends_thinking_in_time_and_answers(portal: BlockingPortal, backend: VllmBackend) -> None:
    """Never beyond budget and slack, always with an answer."""
    (prompt,) = prompts(backend, portal, 1)

    async def scenario(budget: int) -> tuple[int, str]:
        engine = backend.engine("strategy")
        task = Task(prompt, 400, Sampling(temperature=0.7), seed=3)
        answer, out = await play("budget-guidance", engine, task, budget=budget, slack=0.1)
        return thinking(backend, answer.tokens), engine.decode(out.tokens_of("answer"))

    for budget in (5, 20, 60):
        length, text = portal.call(scenario, budget)
        assert length <= round(1.1 * budget) + 1
        assert "\\boxed{" in text


def test_a_grammar_of_tokens_holds_at_guided_steps(portal: BlockingPortal, backend: VllmBackend) -> None:
    """What the sampler may not draw, guidance does not bring back."""
    (prompt,) = prompts(backend, portal, 1)
    allowed = [7, 8, 9, *(token for token in range(20, 24))]

    async def scenario() -> Tokens:
        stream = backend.open("allowed", None, guided(prompt, 10), allowed_token_ids=allowed)
        async with stream as opened:
            return tuple([token async for delta in opened for token in delta.tokens])

    assert set(portal.call(scenario)) <= set(allowed)
