"""From controls to entries: what the front end decides, without an engine."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import anyio
import pytest

from thinkserve.server.model_dir import StartError
from thinkserve.server.vectors import SteeringVector
from thinkserve.server.vllm_controls import NOTHING, Continued, Entry, Steered, steering
from thinkserve.server.vllm_launch import WORKERS, extend
from thinkserve.strategies.chain import continued
from thinkserve.strategies.controls import Positions, Steer
from thinkserve.strategies.engine import Control, Delta, Job, ModelInfo, Stream, Tokens
from thinkserve.strategies.errors import BadOptions, Unsupported
from thinkserve.strategies.streams import Told

OPEN, CLOSE = 3, 4
INFO = ModelInfo("m", 4096, 640, (2,), (OPEN,), (CLOSE,))


@pytest.fixture
def vectors(make_vector: Callable[..., SteeringVector]) -> Mapping[str, SteeringVector]:
    """A vector of one layer and one of two."""
    return {"a": make_vector("a", 1, (2,)), "wide": make_vector("wide", 3, (1, 5))}


def job(*controls: Control, prompt: tuple[int, ...] = (5, OPEN, 6)) -> Job:
    """A job under controls."""
    return Job(prompt, 10, controls=controls)


def test_a_steer_acts_from_the_last_prompt_token_on(vectors: Mapping[str, SteeringVector]) -> None:
    """Several get columns in their order; a scale of 0 is nothing at all; ids are content, not names."""
    a, wide = vectors["a"].id, vectors["wide"].id
    found = steering(
        job(Steer("wide", -1.0), Steer("a", 0.0), Steer("a", 0.5, positions="thinking"), Steer("wide", 1, (5,))),
        INFO,
        vectors,
    )

    assert [
        [wide, -1.0, 2, None, -1, 0],
        [a, 0.5, 2, None, CLOSE, 1],
        [f"{wide}/5", 1.0, 2, None, -1, 2],
    ] == found.args()["steer"]
    assert {wide: {"1", "5"}, a: {"2"}, f"{wide}/5": {"5"}} == {name: set(held) for name, held in found.vectors.items()}
    assert all(data.nbytes == 4 * 128 for held in found.vectors.values() for data in held.values())


@pytest.mark.parametrize(
    ("prompt", "steered"),
    [
        ((5, 6), True),
        ((5, OPEN), True),
        ((5, OPEN, 6, CLOSE), False),
        ((5, CLOSE, 6), False),
        ((OPEN, 6, CLOSE, 5, OPEN), True),
        ((OPEN, 6, CLOSE, 5, OPEN, 7, CLOSE, 8), False),
    ],
)
def test_a_prompt_that_has_ended_its_thinking_is_not_steered_while_thinking(
    vectors: Mapping[str, SteeringVector], prompt: tuple[int, ...], steered: bool
) -> None:
    """An earlier turn's tags do not count when a later one has opened again."""
    found = steering(job(Steer("a", positions="thinking"), prompt=prompt), INFO, vectors)

    assert steered == bool(found.entries)


@pytest.mark.parametrize(("written", "steered"), [((), True), ((OPEN, 7), True), ((OPEN, 7, CLOSE, 8), False)])
def test_tags_that_a_message_quotes_end_no_thinking(
    vectors: Mapping[str, SteeringVector], written: tuple[int, ...], steered: bool
) -> None:
    """Only those count that have been written since generation began."""
    asked = replace(job(Steer("a", positions="thinking"), prompt=(5, CLOSE, 6, *written)), since=3)

    assert steered == bool(steering(asked, INFO, vectors).entries)


def test_no_control_costs_nothing() -> None:
    """Nothing goes to the engine, with a registry or without."""
    assert NOTHING is steering(job(), INFO, None)
    assert {} == NOTHING.args()


class Strange(Control):
    """A control that no adapter knows."""


@pytest.mark.parametrize(
    ("controls", "message"),
    [
        ((Steer("b"),), "No steering vector 'b'; there are: a, wide."),
        ((Steer("a", layers=(2, 3)),), "The vector 'a' has no layer 3."),
        ((Steer("a", math.nan),), "finite"),
        ((Steer("a", math.inf),), "finite"),
        ((Steer("a"),) * 5, "At most 4"),
    ],
)
def test_what_cannot_be_carried_out_is_refused_before_the_engine(
    vectors: Mapping[str, SteeringVector], controls: tuple[Steer, ...], message: str
) -> None:
    """A clear sentence, and nothing reaches the worker."""
    with pytest.raises(BadOptions, match=message):
        steering(job(*controls), INFO, vectors)


def test_what_this_server_lacks_is_refused(vectors: Mapping[str, SteeringVector]) -> None:
    """No registry; a model whose thinking does not end with one token; a control of another kind."""
    with pytest.raises(Unsupported, match="does not steer"):
        steering(job(Steer("a")), INFO, None)
    two = ModelInfo("m", 4096, 640, (2,), (OPEN,), (CLOSE, 5))
    with pytest.raises(Unsupported, match="one token"):
        steering(job(Steer("a", positions="thinking")), two, vectors)
    with pytest.raises(Unsupported, match="Strange"):
        steering(job(Strange()), INFO, vectors)


def test_a_continued_job_keeps_the_past_and_joins_what_goes_on(vectors: Mapping[str, SteeringVector]) -> None:
    """The same control over a longer prompt is one entry; another one begins where the first ends."""
    first = steering(job(Steer("a")), INFO, vectors)
    longer = (5, OPEN, 6, 7, 8)

    same = steering(job(Steer("a"), prompt=longer), INFO, vectors, first)
    other = steering(job(Steer("a", 2.0), prompt=longer), INFO, vectors, first)
    ended = steering(job(prompt=longer), INFO, vectors, first)

    a = vectors["a"].id
    assert (Entry(a, 1.0, 2, None, -1, 0),) == same.entries
    assert (Entry(a, 1.0, 2, 4, -1, 0), Entry(a, 2.0, 4, None, -1, 0)) == other.entries
    assert (Entry(a, 1.0, 2, 4, -1, 0),) == ended.entries
    assert set(first.vectors) == set(ended.vectors)


def test_thinking_that_was_left_unfinished_goes_on_as_one_entry(vectors: Mapping[str, SteeringVector]) -> None:
    """Until the text has closed and opened its thinking again: then the past has a fixed end, and the new its own."""
    control, a = Steer("a", positions="thinking"), vectors["a"].id
    first = steering(job(control), INFO, vectors)

    on = steering(job(control, prompt=(5, OPEN, 6, 7)), INFO, vectors, first)
    again = steering(job(control, prompt=(5, OPEN, 6, 7, CLOSE, OPEN, 8)), INFO, vectors, ended(first, 4))

    assert (Entry(a, 1.0, 2, None, CLOSE, 0),) == on.entries
    assert (Entry(a, 1.0, 2, 4, -1, 0), Entry(a, 1.0, 6, None, CLOSE, 0)) == again.entries


def test_steering_that_came_back_is_joined_with_its_own_last_part(vectors: Mapping[str, SteeringVector]) -> None:
    """On, off, on again: the first part stays apart, the second goes on."""
    a = vectors["a"].id
    past = Steered((Entry(a, 1.0, 2, 4, -1, 0), Entry(a, 1.0, 6, 9, -1, 0)), {})

    found = steering(job(Steer("a"), prompt=(5,) * 10), INFO, vectors, past)

    assert (Entry(a, 1.0, 2, 4, -1, 0), Entry(a, 1.0, 6, None, -1, 0)) == found.entries


def test_a_job_that_goes_on_is_steered_where_its_sequence_was(vectors: Mapping[str, SteeringVector]) -> None:
    """From the last token before what was generated; thinking that ended within it has a fixed end."""
    always, thinking, a = Steer("a"), Steer("a", positions="thinking"), vectors["a"].id

    def entries(control: Steer, written: Tokens) -> tuple[Entry, ...]:
        return steering(continued(job(control), written), INFO, vectors).entries

    assert (Entry(a, 1.0, 2, None, -1, 0),) == entries(always, (7, 8))
    assert (Entry(a, 1.0, 2, None, CLOSE, 0),) == entries(thinking, (7, 8))
    assert (Entry(a, 1.0, 2, 5, -1, 0),) == entries(thinking, (7, 8, CLOSE, 9))
    assert (Entry(a, 1.0, 2, 3, -1, 0),) == entries(thinking, (CLOSE,))


def ended(steered: Steered, stop: int) -> Steered:
    """A segment of which tokens up to `stop` were read."""
    return replace(steered, entries=tuple(replace(entry, stop=stop) for entry in steered.entries))


@pytest.mark.parametrize("burst", [2, 3, 4, 9])
@pytest.mark.parametrize("ours", [(7, 7), (12, 7, 7)], ids=["others", "one as dropped"])
@pytest.mark.parametrize("positions", ["generated", "thinking"])
def test_what_is_put_in_the_place_of_dropped_tokens_is_not_steered(
    vectors: Mapping[str, SteeringVector], positions: Positions, ours: Tokens, burst: int
) -> None:
    """Whatever was read beyond the place, and if the first of ours is the very token that stood there."""
    started: list[tuple[Tokens, tuple[Entry, ...]]] = []
    text = (10, 11, 12, CLOSE, 13, 14)

    @asynccontextmanager
    async def start(job: Job, steered: Steered) -> AsyncIterator[Stream]:
        started.append((job.prompt, steered.entries))
        yield Told(Delta(text[:burst]))

    async def scenario() -> None:
        whole = replace(job(Steer("a", positions=positions)), max_tokens=100)
        chain = Continued(start, lambda job, past: steering(job, INFO, vectors, past), whole, INFO)
        async with chain.segment(50) as stream:
            read = len((await anext(aiter(stream))).tokens)
        chain.drop(read - 2)
        chain.inject(ours)
        async with chain.segment(50):
            pass

    anyio.run(scenario)

    prompt, entries = started[1]
    close = CLOSE if positions == "thinking" else -1
    expected = [(2, 5, -1), (len(prompt) - 1, None, close)]
    assert (5, OPEN, 6, 10, 11, *ours) == prompt
    assert expected == [(entry.start, entry.stop, entry.close) for entry in entries]


def config(**changes: Any) -> Any:
    """vLLM's configuration as far as it matters."""
    parallel = {
        "prefill_context_parallel_size": 1,
        "decode_context_parallel_size": 1,
        "use_sequence_parallel_moe": False,
        "use_ubatching": False,
        "worker_cls": "vllm.v1.worker.gpu_worker.Worker",
    }
    scheduler = {"scheduler_cls": None, "async_scheduling": True}
    return SimpleNamespace(
        parallel_config=SimpleNamespace(**{name: changes.get(name, value) for name, value in parallel.items()}),
        scheduler_config=SimpleNamespace(**{name: changes.get(name, value) for name, value in scheduler.items()}),
        speculative_config=changes.get("speculative_config"),
        additional_config={"thinkserve": {"steering": {}}},
    )


def test_the_engine_gets_our_worker_and_the_scheduler_of_its_kind() -> None:
    """On a GPU the scheduler runs ahead, on a CPU it does not."""
    gpu, cpu = config(), config(worker_cls="vllm.v1.worker.cpu_worker.CPUWorker", async_scheduling=False)
    extend(gpu)
    extend(cpu)

    assert set(WORKERS.values()) == {gpu.parallel_config.worker_cls, cpu.parallel_config.worker_cls}
    assert gpu.scheduler_config.scheduler_cls.endswith(".AsyncScheduler")
    assert cpu.scheduler_config.scheduler_cls.endswith(".Scheduler")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prefill_context_parallel_size": 2}, "context parallelism"),
        ({"decode_context_parallel_size": 2}, "context parallelism"),
        ({"use_sequence_parallel_moe": True}, "sequence parallelism"),
        ({"use_ubatching": True}, "micro-batches"),
        ({"speculative_config": object()}, "speculative decoding"),
        ({"scheduler_cls": "x.Y"}, "a scheduler of its own"),
        ({"worker_cls": "x.Worker"}, "the worker x.Worker"),
    ],
)
def test_what_steering_cannot_work_with_is_told_at_start(changes: dict[str, Any], message: str) -> None:
    """In one line, with the way out."""
    with pytest.raises(StartError, match=f"{message}; switch it off"):
        extend(config(**changes))


def test_a_chain_segment_that_read_nothing_changes_nothing(vectors: Mapping[str, SteeringVector]) -> None:
    """Its entry would be empty, so the next segment begins as if it had not been."""
    past = Steered((Entry("x", 1.0, 2, 3, -1, 0),), {})

    assert (Entry(vectors["a"].id, 1.0, 2, None, -1, 0),) == steering(job(Steer("a")), INFO, vectors, past).entries
