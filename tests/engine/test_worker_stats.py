"""The part `stats` and its way out of the worker, piece by piece, without an engine."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from thinkserve.server.vllm_scheduler import deliver, said_of
from thinkserve.server.vllm_worker import KEY, STATS, Step
from thinkserve.server.vllm_worker_report import joined, reported
from thinkserve.server.vllm_worker_seeds import generators_kept
from thinkserve.server.vllm_worker_stats import Stats

Report = dict[str, dict[str, Any]]


def step(*request_ids: str) -> Step:
    """A pass in which every request has one row."""
    count = np.ones(len(request_ids), dtype=np.int32)
    first = np.arange(len(request_ids))
    return Step(list(request_ids), first, count, first, torch.zeros(len(request_ids), dtype=torch.int32))


def asking(*request_ids: str, vocab: int = 4, close: int = -1) -> Stats:
    """The part after these requests have asked."""
    part = Stats(vocab, close)
    for request_id in request_ids:
        part.admit(request_id, {STATS: True}, None, [1])
    return part


def told(part: Stats, now: Step, logits: Tensor) -> Report:
    """What the part has to say after a pass."""
    part.prepare(now)
    part.logits(now, logits)
    later = part.report()
    return {} if later is None else dict(later())


@pytest.mark.parametrize(
    ("logits", "certainty"), [([2.5] * 4, 0.0), ([0.0, 1.0, 2.0, 3.0], 0.553895), ([7.0, 8.0, 9.0, 10.0], 0.553895)]
)
def test_certainty_is_the_divergence_from_uniform(logits: list[float], certainty: float) -> None:
    """0 where every token is as likely; the same for shifted logits."""
    report = told(asking("a"), step("a"), torch.tensor([logits]))

    assert pytest.approx(certainty, abs=1e-5) == report["a"][STATS][0]


def test_padding_columns_do_not_count() -> None:
    """However large they are; of none of the four numbers."""
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    padded = torch.cat([logits, torch.full((1, 60), 1e4)], 1)

    assert told(asking("a", close=1), step("a"), logits) == told(asking("a", close=1), step("a"), padded)


def test_logits_are_left_as_they_are() -> None:
    """To the bit."""
    logits = torch.randn(3, 4)
    before = logits.clone()

    told(asking("a", "b", "c"), step("a", "b", "c"), logits)

    assert torch.equal(before, logits)


def test_rows_belong_to_requests_of_the_step_wherever_they_lie() -> None:
    """Among neighbours that did not ask, in any order, after rows have moved."""
    part, logits = asking("a", "c"), torch.randn(4, 4)
    rows = [told(asking("x"), step("x"), row[None])["x"][STATS] for row in logits]
    alone = [{STATS: pytest.approx(row)} for row in rows]

    first = told(part, step("b", "c", "d", "a"), logits)
    second = told(part, step("a", "b"), logits[2:])

    assert {"c": alone[1], "a": alone[3]} == first
    assert {"a": alone[2]} == second


def test_without_a_closing_token_nothing_is_near_it() -> None:
    """A model that does not mark its thinking, or with several tokens."""
    assert -inf == told(asking("a"), step("a"), torch.randn(1, 4))["a"][STATS][3]


@pytest.mark.parametrize(
    "leave", [lambda part: part.forget(["a"]), lambda part: part.admit("a", {"steer": []}, None, [])]
)
def test_nothing_is_computed_when_nobody_asks(leave: Callable[[Stats], None]) -> None:
    """Logits that do not fit would be an error if they were looked at."""
    part = asking("a")
    leave(part)
    now = step("a", "b")

    part.prepare(now)
    part.logits(now, torch.zeros(2, 0))

    assert not part.busy
    assert part.report() is None


def test_what_was_not_fetched_is_not_told_of_the_next_step() -> None:
    """A step whose output got lost, a dummy pass: no stale number ever."""
    part = asking("a")
    part.logits(step("a"), torch.randn(1, 4))
    part.prepare(step("a"))

    assert part.report() is None

    part.logits(step("a"), torch.randn(1, 4))
    part.clear()

    assert part.report() is None


class Overlapped:
    """A runner's output that is fetched later."""

    def get_output(self) -> SimpleNamespace:
        """As vLLM's own."""
        return SimpleNamespace(req_ids=["a"])


def test_a_report_is_part_of_the_output_of_its_step() -> None:
    """At once, or when an overlapped step's output is fetched, be it after the next step has been told."""
    part, rows = asking("a"), torch.tensor([[0.0, 1.0, 2.0, 3.0], [2.0, 2.0, 2.0, 2.0]])
    outputs: list[Any] = []
    for row in rows:
        part.logits(step("a"), row[None])
        outputs.append(reported(Overlapped(), KEY, joined([part.report(), None])))
    part.logits(step("a"), rows[:1])
    direct = reported(SimpleNamespace(), KEY, joined([part.report()]))

    certainties = [getattr(output.get_output(), KEY)["a"][STATS][0] for output in outputs]

    assert [pytest.approx(0.553895, abs=1e-5), pytest.approx(0.0, abs=1e-5)] == certainties
    assert pytest.approx(certainties[0]) == getattr(direct, KEY)["a"][STATS][0]


def test_reports_of_several_parts_are_joined() -> None:
    """By request, then by name; without any there is no attribute."""
    later = joined([lambda: {"a": {"x": 1}}, None, lambda: {"a": {"y": 2}, "b": {"y": 3}}])

    assert later is not None
    assert {"a": {"x": 1, "y": 2}, "b": {"y": 3}} == later()
    assert not hasattr(reported(SimpleNamespace(), KEY, joined([None])), KEY)


def output(request_id: str, tokens: list[int], params: dict[str, Any] | None = None) -> Any:
    """As the scheduler makes it."""
    return SimpleNamespace(request_id=request_id, new_token_ids=tokens, kv_transfer_params=params)


def test_reports_join_outputs_that_carry_a_token() -> None:
    """Not those that only end a request, and never another's; what vLLM put there stays."""
    outputs = [output("a", [5]), output("b", []), output("c", [6]), output("d", [7], {"own": 1})]

    deliver({0: SimpleNamespace(outputs=outputs)}, {name: {STATS: [1.0]} for name in "abd"})

    assert [{STATS: [1.0]}, {}, {}, {STATS: [1.0]}] == [said_of(each) for each in outputs]
    assert 1 == outputs[3].kv_transfer_params["own"]


def runner(dropped: list[bool]) -> Any:
    """Model runner V1 as far as it matters: a generator for each row, and which rows draw in vain."""
    generators = {row: torch.Generator().manual_seed(row) for row in range(len(dropped))}
    batch = SimpleNamespace(num_reqs=len(dropped), generators=generators)
    return SimpleNamespace(input_batch=batch, discard_request_mask=SimpleNamespace(np=np.array([*dropped, True, True])))


def test_rows_that_draw_in_vain_use_up_no_random_numbers() -> None:
    """Their generators are out of reach while tokens are sampled, and back afterwards."""
    fake = runner([True, False, True])
    all_of_them = dict(fake.input_batch.generators)

    with generators_kept(fake):
        within = set(fake.input_batch.generators)

    assert {1} == within
    assert all_of_them == fake.input_batch.generators
