"""The worker's steering without an engine: which rows are steered, by how much, and what is left afterwards."""

from __future__ import annotations

from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from vllm.config import CompilationMode, CUDAGraphMode

from thinkserve.server.vllm_worker import Step
from thinkserve.server.vllm_worker_blocks import graft_blocks
from thinkserve.server.vllm_worker_steering import Sizes, Steering

HIDDEN, LAYERS, CLOSE = 16, (0, 1, 2), 9
EAGER = SimpleNamespace(mode=CompilationMode.NONE, cudagraph_mode=CUDAGraphMode.NONE)
GRAPHS = SimpleNamespace(mode=CompilationMode.NONE, cudagraph_mode=CUDAGraphMode.FULL)
INDUCTOR = SimpleNamespace(mode=CompilationMode.VLLM_COMPILE, cudagraph_mode=CUDAGraphMode.NONE)


class Block(nn.Module):
    """A decoder block as the models have it: what it adds to the stream, and the stream before."""

    def forward(self, hidden: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Add nothing."""
        return hidden.clone(), residual


@pytest.fixture
def part() -> Steering:
    """A part with room for 4 vectors, a (layers 0 and 2) and b (layer 2) loaded."""
    steering = Steering(Sizes(rows=64, columns=2, slots=4, hidden=HIDDEN), LAYERS, torch.device("cpu"))
    assert steering.load("a", {"0": numbers(0), "2": numbers(1)})
    assert steering.load("b", {"2": numbers(2)})
    return steering


def numbers(seed: int) -> bytes:
    """The bytes of a vector."""
    return np.random.default_rng(seed).normal(size=HIDDEN).astype(np.float32).tobytes()


def vector(seed: int) -> Tensor:
    """The same as a tensor."""
    return torch.frombuffer(bytearray(numbers(seed)), dtype=torch.float32)


def ask(part: Steering, name: str, *entries: list[Any], tokens: tuple[int, ...] = ()) -> None:
    """A request arrives."""
    part.admit(name, {"steer": list(entries)}, None, list(tokens))


def step(*requests: tuple[str, int, int], ids: Tensor | None = None) -> Step:
    """A step of (request, position of its first row, number of rows)."""
    count = np.array([many for *_, many in requests], np.int32)
    first, rows = np.cumsum(count) - count, int(count.sum())
    position = np.array([at for _, at, _ in requests], np.int32)
    return Step([name for name, *_ in requests], first, count, position, torch.zeros(rows) if ids is None else ids)


def added(part: Steering, step: Step, config: Any, layer: int, *, exact: bool = False) -> Tensor:
    """What block `layer` adds to the stream of each row of a step."""
    blocks = nn.ModuleList(Block() for _ in LAYERS)
    graft_blocks(blocks, part, config, exact=exact)
    part.prepare(step)
    rows = int(step.count.sum())
    before = torch.randn(rows, HIDDEN)
    after: Tensor = blocks[layer](before, torch.randn(rows, HIDDEN))[0]
    return after - before


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("config", [EAGER, GRAPHS, INDUCTOR], ids=["eager", "graphs", "inductor"])
def test_the_state_differs_by_scale_times_vector_on_steered_rows_only(part: Steering, config: Any, exact: bool) -> None:
    """Two vectors on one request, one on another, none on the third; each on its own layers."""
    ask(part, "both", ["a", 0.5, 2, None, -1, 0], ["b", -2.0, 3, None, -1, 1])
    ask(part, "one", ["b", 3.0, 0, 5, -1, 0])
    now = step(("one", 4, 2), ("none", 7, 1), ("both", 1, 3))

    expected = {layer: torch.zeros(6, HIDDEN) for layer in LAYERS}
    expected[0][4:6] = 0.5 * vector(0)
    expected[2][0] = 3.0 * vector(2)
    expected[2][4:6] = 0.5 * vector(1)
    expected[2][5] += -2.0 * vector(2)

    for layer in LAYERS:
        actual = added(part, now, config, layer, exact=exact)
        torch.testing.assert_close(actual, expected[layer], rtol=0, atol=2e-6)
        assert torch.equal(actual == 0, expected[layer] == 0)


def test_rows_follow_the_requests_when_the_batch_changes(part: Steering) -> None:
    """Batches of any order, prompts in pieces, requests that come and go: the rows equal a row-by-row account."""
    draw = Random(5)
    spans = {f"r{n}": (draw.randrange(10), draw.randrange(10, 30), draw.random()) for n in range(8)}
    for name, (start, stop, scale) in spans.items():
        ask(part, name, ["a", scale, start, stop, -1, 0])
    members = ["r0"]
    for _ in range(400):
        if draw.random() < 0.3:
            members = draw.sample([*spans, "x", "y"], draw.randrange(1, 8))
        # Mostly one token each, as when all requests write, and at times a prompt among them.
        longest = draw.choice([1, 1, 1, 7])
        now = step(*((name, draw.randrange(25), draw.randint(1, longest)) for name in members))
        part.prepare(now)

        expected = [
            spans[name][2] if name in spans and spans[name][0] <= at + row < spans[name][1] else None
            for name, at, many in zip(now.request_ids, now.position, now.count, strict=True)
            for row in range(many)
        ]
        scales = [float(s) if i >= 0 else None for i, s in zip(part.index[:, 0], part.scale[:, 0], strict=True)]
        assert pytest.approx(expected) == scales[: len(expected)]
        assert scales[len(expected) :] == [None] * (len(scales) - len(expected))
        assert bool((part.index[:, 1] == -1).all())


def test_only_the_true_last_prompt_token_of_a_prompt_in_pieces_is_steered(part: Steering) -> None:
    """A prompt of 10 tokens comes as 4 + 4 + 2: its row 9 is the first steered one, then every generated token."""
    ask(part, "r", ["a", 1.0, 9, None, -1, 0])
    steered = []
    for at, many in ((0, 4), (4, 4), (8, 2), (10, 1)):
        part.prepare(step(("r", at, many)))
        steered.append((part.index[:many, 0] >= 0).tolist())

    assert [[False] * 4, [False] * 4, [False, True], [True]] == steered


def test_the_token_that_ends_thinking_ends_the_steering(part: Steering) -> None:
    """Its own row is the first unsteered one; end tokens of the prompt do not count; other requests go on."""
    ask(part, "r", ["a", 1.0, 3, None, CLOSE, 0], ["b", 1.0, 3, None, -1, 1], tokens=(1, CLOSE, 2, CLOSE))
    ask(part, "s", ["a", 1.0, 0, None, CLOSE, 0])
    seen = []
    for at, token in ((3, CLOSE), (4, 5), (5, CLOSE), (6, 5)):
        part.prepare(step(("s", at, 1), ("r", at, 1), ids=torch.tensor([5, token])))
        seen.append((part.index[:2] >= 0).tolist())

    on, off = [[True, False], [True, True]], [[True, False], [False, True]]
    assert [on, on, off, off] == seen


def test_thinking_that_ended_before_a_request_came_back_stays_ended(part: Steering) -> None:
    """Resumed from the prefix cache after preemption: the row with the end token is not computed again."""
    ask(part, "r", ["a", 1.0, 1, None, CLOSE, 0], tokens=(1, 2, 3, CLOSE, 4, 5))
    part.prepare(step(("r", 1, 5), ids=torch.tensor([2, 3, CLOSE, 4, 5])))
    recomputed = (part.index[:5, 0] >= 0).tolist()
    part.prepare(step(("r", 5, 1), ids=torch.tensor([5])))

    assert ([True, True, False, False, False], False) == (recomputed, bool((part.index[:, 0] >= 0).any()))


def test_nothing_is_left_of_requests_that_ended(part: Steering) -> None:
    """Neither entries nor rows nor places; a request without steering under the same id is not steered."""
    ask(part, "r", ["a", 1.0, 0, None, CLOSE, 0])
    part.prepare(step(("r", 0, 5)))
    part.forget(["r", "unknown"])
    left = part.busy

    part.prepare(step(("r", 5, 3)))

    assert (True, False) == (left, part.busy)
    assert {"requests": 0, "vectors": 2, "rows": 0, "thinking": 0} == part.state()
    assert part.layers_now == frozenset()


def test_a_dummy_pass_is_nobodys(part: Steering) -> None:
    """Capture and profiling must not meet the rows of the last step."""
    ask(part, "r", ["a", 1.0, 0, None, -1, 0])
    part.prepare(step(("r", 0, 5)))

    part.clear()

    assert bool((part.index == -1).all())


def test_a_full_table_says_no_and_a_dropped_vector_makes_room(part: Steering) -> None:
    """Loading what is there changes nothing; a reused place holds nothing of the vector before."""
    assert [part.load(name, {"1": numbers(7)}) for name in ("c", "d", "e", "a")] == [True, True, False, True]
    part.drop("a")
    part.drop("never loaded")

    assert part.load("e", {"1": numbers(8)})

    ask(part, "r", ["e", 1.0, 0, None, -1, 0])
    assert float(added(part, step(("r", 0, 1)), GRAPHS, 0).abs().max()) == 0.0
    torch.testing.assert_close(added(part, step(("r", 0, 1)), GRAPHS, 1)[0], vector(8), rtol=0, atol=2e-6)


def test_an_unknown_vector_harms_nobody(part: Steering) -> None:
    """The front end never sends one; the worker goes on all the same."""
    ask(part, "r", ["gone", 1.0, 0, None, -1, 0])
    ask(part, "s", ["gone", 1.0, 0, None, CLOSE, 0], ["b", 1.0, 0, None, -1, 1])
    part.prepare(step(("r", 0, 1), ("s", 0, 1)))

    assert [[False, False], [False, True]] == (part.index[:2] >= 0).tolist()


def test_more_thinkers_than_places_get_more_places(part: Steering) -> None:
    """Places grow; those that are taken keep what they know."""
    for n in range(600):
        ask(part, f"r{n}", ["a", 1.0, 0, None, CLOSE, 0], tokens=(1, CLOSE) if n % 2 else (1, 2))
    steered = []
    for n in (0, 1, 300, 301, 598, 599):
        part.prepare(step((f"r{n}", 2, 1), ids=torch.tensor([3])))
        steered.append(bool(part.index[0, 0] >= 0))

    assert [True, False] * 3 == steered
