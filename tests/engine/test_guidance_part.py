"""The part `guidance` step by step, without an engine: who is guided when, towards how much, and what is written."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from thinkserve.guidance.checkpoint import About
from thinkserve.guidance.predictor import Predictor, Size
from thinkserve.kernels.guide import guide
from thinkserve.server.vllm_guidance import guidance
from thinkserve.server.vllm_worker import Step
from thinkserve.server.vllm_worker_guidance import BELOW, SPREAD, Guidance, written
from thinkserve.server.vllm_worker_states import States
from thinkserve.server.vllm_worker_states import _seen as seen_by
from thinkserve.strategies.controls import Guide
from thinkserve.strategies.engine import Job, ModelInfo, Tokens
from thinkserve.strategies.errors import BadOptions, Unsupported

OPEN, CLOSE, NEWLINE, PLAIN = 1, 2, 3, 4
VOCABULARY, HIDDEN = 12, 8


@dataclass
class Bench:
    """A part, and the predictor that it uses."""

    part: Guidance
    states: States
    predictor: Predictor

    def admit(self, request_id: str, budget: int, prompt: int, *, opens: int = -1, temperature: float = 1.0) -> None:
        """A request whose prompt has `prompt` tokens."""
        wanted = {"budget": budget, "start": prompt, "open": opens, "begun": False}
        self.part.admit(
            request_id, {"guide": wanted}, SimpleNamespace(temperature=temperature, logprobs=None), [0] * prompt
        )

    def step(self, last: dict[str, tuple[int, int]]) -> list[tuple[str, float]]:
        """A step in which each request's last row holds (position, token); who is guided, with how much remaining."""
        step = step_of(last)
        self.part.prepare(step)
        return [(step.request_ids[r], left) for r, left in zip(self.part._rows, self.part._remaining, strict=True)]


def step_of(last: dict[str, tuple[int, int]]) -> Step:
    """One row per request."""
    count = len(last)
    positions, tokens = zip(*last.values(), strict=True)
    return Step(list(last), np.arange(count), np.ones(count, dtype=np.int64), np.array(positions), torch.tensor(tokens))


@pytest.fixture
def bench() -> Bench:
    """A predictor of random weights whose rates are large enough to pass the masks."""
    torch.manual_seed(0)
    predictor = Predictor(Size(HIDDEN, 3, VOCABULARY, 64, 1, 2)).eval().requires_grad_(False)
    predictor.alpha.weight.mul_(60).abs_()
    predictor.rate.weight.mul_(60).abs_()
    states = States(3, 8, HIDDEN, torch.zeros(1))
    return Bench(
        Guidance(predictor, About(predictor.size, CLOSE, (NEWLINE,), "", lam_min=2.0), states), states, predictor
    )


def run(bench: Bench, tokens: Iterable[int], budget: int = 100, prompt: int = 5, opens: int = -1) -> list[float]:
    """Remaining budget at every guided step of one request that writes `tokens`; the last prompt token is plain."""
    bench.admit("a", budget, prompt, opens=opens)
    found: list[float] = []
    for position, token in enumerate([PLAIN, *tokens], prompt - 1):
        found += [left for _, left in bench.step({"a": (position, token)})]
    return found


@pytest.mark.parametrize(
    ("tokens", "remaining"),
    [
        ([PLAIN, PLAIN, PLAIN], [100.0]),
        ([PLAIN, NEWLINE, PLAIN, NEWLINE], [100.0, 98.0, 96.0]),
        ([NEWLINE, NEWLINE], [100.0, 99.0, 98.0]),
        ([PLAIN, NEWLINE, CLOSE, NEWLINE, PLAIN, NEWLINE], [100.0, 98.0]),
        ([CLOSE, NEWLINE], [100.0]),
    ],
)
def test_the_first_token_and_each_one_after_a_line_break_is_guided_while_thinking(
    bench: Bench, tokens: list[int], remaining: list[float]
) -> None:
    """One more than the thinking tokens with a line break; what remains is the budget less the tokens written."""
    assert remaining == run(bench, tokens)


def test_what_remains_is_never_less_than_one(bench: Bench) -> None:
    """Beyond the budget the aim is to end at once."""
    assert [2.0, 1.0, 1.0, 1.0] == run(bench, [NEWLINE] * 3, budget=2)


def test_a_model_that_opens_its_thinking_itself_is_guided_from_there(bench: Bench) -> None:
    """The opening tag is not part of the budget, and what comes before it is not guided."""
    assert [50.0, 48.0] == run(bench, [NEWLINE, OPEN, PLAIN, NEWLINE, CLOSE], budget=50, opens=OPEN)


def test_a_prompt_that_is_computed_in_pieces_is_guided_at_its_end_only(bench: Bench) -> None:
    """Rows of a piece draw nothing."""
    bench.admit("a", 100, 9)

    assert [[], [], [("a", 100.0)]] == [bench.step({"a": (position, NEWLINE)}) for position in (3, 7, 8)]


def test_a_preempted_request_goes_on_where_it_was(bench: Bench) -> None:
    """Readmitted with its tokens: the budget goes on, and thinking that has ended stays so."""
    written = [PLAIN, PLAIN, NEWLINE, PLAIN, NEWLINE]
    wanted = {"guide": {"budget": 100, "start": 2, "open": -1, "begun": False}}
    bench.part.admit("a", wanted, SimpleNamespace(temperature=1.0, logprobs=None), written)

    assert [("a", 97.0)] == bench.step({"a": (4, NEWLINE)})
    bench.part.admit(
        "a", wanted, SimpleNamespace(temperature=1.0, logprobs=None), [PLAIN, PLAIN, NEWLINE, CLOSE, NEWLINE]
    )
    assert [] == bench.step({"a": (4, NEWLINE)})


def test_requests_are_told_apart_by_their_id_in_any_order(bench: Bench) -> None:
    """Rows move, others come and go."""
    bench.admit("a", 100, 5)
    bench.admit("b", 50, 3)

    assert [("b", 50.0), ("a", 100.0)] == bench.step({"b": (2, PLAIN), "x": (7, NEWLINE), "a": (4, PLAIN)})
    assert [("a", 99.0)] == bench.step({"a": (5, NEWLINE), "b": (3, PLAIN)})
    bench.part.forget(["a"])
    assert [("b", 48.0)] == bench.step({"a": (6, NEWLINE), "b": (4, NEWLINE)})


def test_a_row_that_is_no_longer_wanted_points_to_the_first(bench: Bench) -> None:
    """Where copying is part of a fixed graph every index is read, and a pass may be as small as one row."""
    bench.admit("a", 100, 5)
    bench.step({"x": (3, 0), "y": (3, 0), "a": (4, 0)})
    before = bench.states.index.tolist()
    bench.part.forget(["a"])

    assert bench.part.busy
    assert [] == bench.step({"x": (4, 0)})
    assert [2, 0, 0] == before[:3]
    assert 0 == bench.states.index.max()
    assert not bench.part.busy


def write(bench: Bench, logits: Tensor, last: dict[str, tuple[int, int]]) -> Tensor:
    """What the part makes of `logits` in one step whose states are random."""
    step = step_of(last)
    bench.part.prepare(step)
    bench.states.out.normal_(generator=torch.Generator().manual_seed(3))
    return bench.part.logits(step, logits.clone())


def test_guided_rows_hold_the_guided_distribution_times_the_temperature(bench: Bench) -> None:
    """The sampler divides by the temperature; greedy ones are left as they are. Others are not touched."""
    bench.admit("warm", 40, 5, temperature=0.5)
    bench.admit("greedy", 20, 5, temperature=0.0)
    logits = torch.randn(3, VOCABULARY + 4)

    changed = write(bench, logits, {"warm": (4, 0), "other": (4, NEWLINE), "greedy": (4, 0)})

    alpha, rate = bench.predictor(bench.states.out[:, :2].transpose(0, 1))
    expected = guide(logits[[0, 2], :VOCABULARY], alpha, rate, torch.tensor([40.0, 20.0]), lam_min=2.0)
    found = torch.stack((changed[0] / 0.5, changed[2]))
    assert torch.equal(logits[1], changed[1])
    torch.testing.assert_close(found[:, :VOCABULARY].softmax(-1), expected.exp())
    assert (found[:, VOCABULARY:] == -torch.inf).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_where_every_guided_token_is_banned_the_models_own_order_decides(bench: Bench, dtype: torch.dtype) -> None:
    """A mask after guidance never leaves a row without a token, whatever type the model computes in."""
    bench.predictor.rate.weight.zero_()  # too diffuse, all of them: one token is left
    bench.admit("a", 40, 5)
    logits = (4 * torch.randn(1, VOCABULARY)).to(dtype)

    changed = write(bench, logits, {"a": (4, 0)})

    best = int(logits.argmax())
    banned, own = changed.clone(), logits.float()
    banned[0, best] = own[0, best] = -torch.inf
    assert 1.0 == changed.softmax(-1)[0, best]
    torch.testing.assert_close(banned.softmax(-1), own.softmax(-1), atol=2e-3, rtol=1e-2)


@pytest.mark.parametrize("temperature", [0.01, 0.7, 1.0, 2.0])
@pytest.mark.parametrize("guided", [-math.inf, -700.0, -60.0, -20.0], ids=str)
@pytest.mark.parametrize("own", [-40.0, -8.0, 8.0], ids=str)
def test_a_bias_of_100_forces_and_one_of_minus_100_bans_any_token(
    temperature: float, guided: float, own: float
) -> None:
    """One token is guided, another is as far away as it may be; the sampler adds the bias before it divides."""
    log_p = torch.full((1, VOCABULARY), guided)
    log_p[0, PLAIN] = 0.0
    raw = torch.zeros(1, VOCABULARY)
    raw[0, NEWLINE], heat = own, torch.tensor([temperature])

    def drawn(token: int, bias: float) -> float:
        logits = written(log_p, raw, heat)
        logits[0, token] += bias
        return float((logits / temperature).softmax(-1)[0, token])

    assert drawn(NEWLINE, 100) > 0.999
    assert drawn(PLAIN, -100) < 0.001
    assert drawn(PLAIN, 0) > 0.999999


def test_what_nobody_may_draw_stays_so_and_what_is_guided_stays_as_published() -> None:
    """A raw logit of -inf, whatever else is written; and of the others the guided are not moved."""
    raw = torch.tensor([[2.0, -torch.inf, 1.0, -90.0]])
    log_p = torch.tensor([[-0.5, -torch.inf, -torch.inf, -0.9]])

    found = written(log_p, raw, torch.tensor([0.5]))[0]

    assert [-0.25, -torch.inf, -0.45] == [pytest.approx(float(found[i])) for i in (0, 1, 3)]
    assert -BELOW - SPREAD <= float(found[2]) <= -BELOW


INFO = ModelInfo("m", 100, VOCABULARY, (0,), (OPEN,), (CLOSE,))


def chained(bench: Bench, prompt: tuple[int, ...], *segments: tuple[int, ...]) -> list[list[float]]:
    """Remaining budget at the guided steps of each segment of a chain; a segment's last token is drawn, not read."""
    found: list[list[float]] = []
    sequence, budget = prompt, Guide(100)
    for segment in segments:
        job = Job(sequence, 10, controls=(budget.later(len(sequence) - len(prompt)),))
        bench.part.admit(
            "a", guidance(job, INFO, served=True), SimpleNamespace(temperature=1.0, logprobs=None), list(sequence)
        )
        steps = enumerate([sequence[-1], *segment[:-1]], len(sequence) - 1)
        found.append([left for step in steps for _, left in bench.step({"a": step})])
        sequence += segment
    return found


@pytest.mark.parametrize("prompt", [(5, OPEN), (5, OPEN, NEWLINE), (5, 6)], ids=["tag", "tag and line break", "none"])
@pytest.mark.parametrize("cuts", [(), (1,), (2,), (3,), (2, 3), (1, 2, 3, 4, 5, 6)], ids=str)
def test_a_continued_job_is_guided_where_one_job_would_be(
    bench: Bench, prompt: tuple[int, ...], cuts: tuple[int, ...]
) -> None:
    """At the first token of thinking and behind each line break, not where a segment begins within a line."""
    opening = () if OPEN in prompt else (OPEN,)
    text = (*opening, PLAIN, PLAIN, NEWLINE, PLAIN, NEWLINE, PLAIN, PLAIN)
    edges = [0, *(cut + len(opening) for cut in cuts), len(text)]

    whole = chained(bench, prompt, text)
    parts = chained(bench, prompt, *(text[a:b] for a, b in itertools.pairwise(edges)))

    assert [100.0, 97.0, 95.0] == whole[0]
    assert 1 + text.count(NEWLINE) == sum(map(len, parts))
    # What is left of a budget knows of tokens only: an opening tag that was written counts from the next segment on.
    assert pytest.approx(whole[0], abs=len(opening)) == [left for each in parts for left in each]


def asked(prompt: Sequence[int], *budgets: int, info: ModelInfo = INFO, served: bool = True, since: int = 0) -> object:
    """What a job with these guides tells the worker."""
    job = Job(Tokens(prompt), 10, controls=tuple(Guide(budget) for budget in budgets), since=since)
    return guidance(job, info, served).get("guide")


@pytest.mark.parametrize(
    ("prompt", "opens"),
    [((5, OPEN, 6), -1), ((5, 6), OPEN), ((OPEN, 5, CLOSE, 6), None), ((OPEN, CLOSE, OPEN), -1), ((CLOSE, 6), None)],
)
def test_what_is_asked_depends_on_where_the_prompt_ends(prompt: tuple[int, ...], opens: int | None) -> None:
    """Inside thinking, of which there may be some already, before it, behind it."""
    begun = opens == -1 and prompt[-1] != OPEN
    expected = None if opens is None else {"budget": 30, "start": len(prompt), "open": opens, "begun": begun}

    assert expected == asked(prompt, 30)


@pytest.mark.parametrize("quoted", [(CLOSE, 6), (OPEN, 6), (OPEN, 5, CLOSE, 6)])
def test_tags_that_a_message_quotes_begin_and_end_nothing(quoted: tuple[int, ...]) -> None:
    """Where the model is yet to open its thinking; what it has written itself counts."""
    start = len(quoted)
    assert {"budget": 30, "start": start, "open": OPEN, "begun": False} == asked(quoted, 30, since=start)
    opened = {"budget": 30, "start": start + 2, "open": -1, "begun": True}
    assert opened == asked((*quoted, OPEN, 7), 30, since=start)
    assert None is asked((*quoted, OPEN, 7, CLOSE), 30, since=start)


def test_the_tightest_of_several_budgets_holds_and_none_asks_for_nothing() -> None:
    """A modifier may add its own."""
    assert {"budget": 20, "start": 1, "open": -1, "begun": False} == asked((OPEN,), 30, 20)
    assert None is asked((OPEN,))


def test_what_cannot_be_guided_is_refused() -> None:
    """No predictor, no tag of one token, no budget."""
    with pytest.raises(Unsupported) as caught:
        asked((OPEN,), 30, served=False)
    assert "strategy" == caught.value.param
    with pytest.raises(Unsupported):
        asked((OPEN,), 30, info=ModelInfo("m", 100, VOCABULARY, (0,), (OPEN,), (CLOSE, CLOSE)))
    with pytest.raises(BadOptions):
        asked((OPEN,), 0)


@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize(("last", "expected"), [(False, 3.0), (True, 30.0)])
def test_the_last_state_is_normed_however_the_model_calls_its_norm(
    last: bool, expected: float, with_residual: bool
) -> None:
    """As in transformers, where the predictor has learned: the others are raw, with the residual in them."""
    x, residual = torch.full((2, 4), 1.0 if with_residual else 3.0), torch.full((2, 4), 2.0)
    output = (10 * (x + residual), x + residual) if with_residual else 10 * x
    seen = seen_by(SimpleNamespace(thinkserve_last=last), (x, residual) if with_residual else (x,), output)
    assert torch.equal(torch.full((2, 4), expected), seen)
