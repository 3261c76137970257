"""Work on several items side by side, in one task group."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

from anyio import create_task_group

from thinkserve.strategies.errors import leading

Item = TypeVar("Item")
Found = TypeVar("Found")


async def together(work: Callable[[Item], Awaitable[Found]], items: Iterable[Item]) -> list[Found]:
    """What `work` comes to for each item, in their order; all are begun at once.

    The first failure cancels the others; of several errors the leading one is raised, not a group.
    """
    found = dict[int, Found]()

    async def one(index: int, item: Item) -> None:
        found[index] = await work(item)

    try:
        async with create_task_group() as group:
            for index, item in enumerate(items):
                group.start_soon(one, index, item)
    except BaseExceptionGroup as errors:
        raise leading(errors) from errors
    return [found[index] for index in range(len(found))]
