"""The registry: found by name or alias, refused with a hint."""

from __future__ import annotations

import pytest

from thinkserve.strategies import registry
from thinkserve.strategies.engine import Answer, Emit, Engine, Task
from thinkserve.strategies.errors import UnknownStrategy
from thinkserve.strategies.registry import Options


def test_the_built_in_strategies_are_there() -> None:
    """Found through the entry point, like anybody's."""
    assert {"single", "majority", "short-m-at-k"} <= set(registry.names())


def test_an_alias_is_the_same_strategy() -> None:
    """short-m@k is how the paper writes it."""
    assert registry.get("short-m-at-k") is registry.get("short-m@k")


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    """And with the list of all."""
    with pytest.raises(UnknownStrategy, match=r"majority.*Available: .*single") as caught:
        registry.get("majorty")

    assert "majority" == caught.value.nearest


@pytest.mark.parametrize(("id", "complaint"), [("Not A Slug", "slug"), ("single", "taken")])
def test_a_bad_or_taken_name_is_refused(id: str, complaint: str) -> None:
    """At import, where the author sees it."""

    async def run(task: Task, engine: Engine, emit: Emit, options: Options) -> Answer:
        """Nothing."""
        return Answer((), "stop")

    registry.discover()
    with pytest.raises(ValueError, match=complaint):
        registry.strategy(id, options=Options)(run)
