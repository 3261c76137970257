"""Which vectors the worker holds: loaded once, kept while used, waited for where all places are taken."""

from __future__ import annotations

from typing import Any

import anyio
import pytest

from thinkserve.server.errors import ApiError
from thinkserve.server.vllm_vectors import Kept, LoadedVectors

PAYLOAD = {"0": memoryview(b"").cast("f")}


class Worker:
    """Records what it is told; `slow` makes every call wait."""

    def __init__(self, slow: bool = False) -> None:
        self.told: list[tuple[str, str]] = []
        self.slow = slow

    async def __call__(self, method: str, *args: Any) -> list[Any]:
        if self.slow:
            await anyio.sleep(0.01)
        self.told.append((method, args[0]))
        return [True]


def test_a_vector_is_loaded_once_and_leaves_when_another_needs_its_place() -> None:
    """The one that was used longest ago goes first, and none that is in use."""
    worker = Worker()
    loaded = LoadedVectors(worker, slots=2)

    async def scenario() -> None:
        async with loaded.hold({"a": PAYLOAD}), loaded.hold({"a": PAYLOAD, "b": PAYLOAD}):
            assert {"a": 2, "b": 1} == loaded.users
        async with loaded.hold({"a": PAYLOAD}):
            pass
        async with loaded.hold({"c": PAYLOAD, "a": PAYLOAD}):
            pass
        assert {"c": 0, "a": 0} == loaded.users

    anyio.run(scenario)
    assert [("load", "a"), ("load", "b"), ("drop", "b"), ("load", "c")] == worker.told


def test_what_a_leaving_caller_had_begun_to_load_stays_known() -> None:
    """Both sides agree afterwards, and the next one need not load it."""
    worker = Worker(slow=True)
    loaded = LoadedVectors(worker, slots=1)

    async def scenario() -> None:
        with anyio.move_on_after(0.002):
            async with loaded.hold({"a": PAYLOAD}):
                await anyio.sleep(1)
        async with loaded.hold({"a": PAYLOAD}):
            assert {"a": 1} == loaded.users

    anyio.run(scenario)
    assert [("load", "a")] == worker.told


def test_many_callers_of_one_vector_load_it_once() -> None:
    """They wait for each other."""
    worker = Worker(slow=True)
    loaded = LoadedVectors(worker, slots=1)

    async def one() -> None:
        async with loaded.hold({"a": PAYLOAD}):
            await anyio.sleep(0.001)

    async def scenario() -> None:
        async with anyio.create_task_group() as group:
            for _ in range(20):
                group.start_soon(one)

    anyio.run(scenario)
    assert ([("load", "a")], {"a": 0}) == (worker.told, loaded.users)


def test_who_finds_no_place_waits_for_one_in_turn() -> None:
    """Also for several at once; who needs nothing new passes by."""
    worker = Worker()
    loaded = LoadedVectors(worker, slots=2)
    got: list[str] = []

    async def take(*names: str) -> None:
        async with loaded.hold(dict.fromkeys(names, PAYLOAD)):
            got.append("+".join(names))

    async def scenario() -> None:
        async with anyio.create_task_group() as group, loaded.hold({"a": PAYLOAD}):
            async with loaded.hold({"b": PAYLOAD}):
                for names in (("c", "d"), ("e",), ("a",), ("b", "a")):
                    group.start_soon(take, *names)
                await anyio.wait_all_tasks_blocked()
                assert ["a", "b+a"] == got
            await anyio.wait_all_tasks_blocked()
            assert ["a", "b+a"] == got
        assert {0} == set(loaded.users.values())

    anyio.run(scenario)
    assert ["a", "b+a", "c+d", "e"] == got


def test_who_waits_for_a_place_can_leave() -> None:
    """A deadline ends the wait, and harms nobody who waits behind."""
    loaded = LoadedVectors(Worker(), slots=1)

    async def scenario() -> None:
        async with loaded.hold({"a": PAYLOAD}):
            with anyio.move_on_after(0.01) as waited:
                async with loaded.hold({"b": PAYLOAD}):
                    pass
            assert waited.cancelled_caught
            assert {"a": 1} == loaded.users
        with anyio.fail_after(1):
            async with loaded.hold({"c": PAYLOAD}):
                assert {"c": 1} == loaded.users

    anyio.run(scenario)


def test_more_vectors_than_there_are_places_are_refused_at_once() -> None:
    """Nobody could ever make room for them."""
    loaded = LoadedVectors(Worker(), slots=1)

    with pytest.raises(ApiError) as error:
        anyio.run(loaded.take, {"a": PAYLOAD, "b": PAYLOAD})

    assert (503, "steering_busy") == (error.value.status, error.value.code)


def test_a_chain_keeps_its_places_between_its_segments() -> None:
    """Who waits for one gets it when the chain needs it no more: it has others in its place, or has ended."""
    loaded = LoadedVectors(Worker(), slots=1)
    chain, other = Kept(loaded), Kept(loaded)

    async def scenario() -> None:
        await chain.change({"a": PAYLOAD})
        async with anyio.create_task_group() as group:
            group.start_soon(other.change, {"b": PAYLOAD})
            for _ in range(3):
                await anyio.wait_all_tasks_blocked()
                await chain.change({"a": PAYLOAD})
            assert {"a": 1} == loaded.users
            chain.release()
        assert {"b": 1} == loaded.users
        other.release()
        chain.release()
        assert {"b": 0} == loaded.users

    anyio.run(scenario)


def test_chains_that_want_each_others_places_do_not_wait_forever() -> None:
    """Who waits keeps nothing."""
    loaded = LoadedVectors(Worker(), slots=2)
    one, two = Kept(loaded), Kept(loaded)

    async def grow(chain: Kept, *names: str) -> None:
        await chain.change(dict.fromkeys(names, PAYLOAD))
        await anyio.wait_all_tasks_blocked()
        chain.release()

    async def scenario() -> None:
        await one.change({"a": PAYLOAD})
        await two.change({"b": PAYLOAD})
        with anyio.fail_after(1):
            async with anyio.create_task_group() as group:
                group.start_soon(grow, one, "a", "c")
                group.start_soon(grow, two, "b", "d")

    anyio.run(scenario)
    assert {0} == set(loaded.users.values())
