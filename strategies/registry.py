"""How a strategy becomes known: a decorator on its `run`, found through the entry point group `thinkserve.strategies`.

An entry point names a module or a package; of a package every module is imported. The built-ins come in by the same
door as a stranger's package: one entry point that names `thinkserve.strategies`, so a new built-in is one new file.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import Any, Literal, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict

from thinkserve.strategies.engine import Answer, Control, Emit, Engine, Role, Task
from thinkserve.strategies.errors import UnknownStrategy

GROUP = "thinkserve.strategies"
StreamMode = Literal["winner", "leader", "none"]
# For strategies whose chains are each one job on the task's prompt.
LED: tuple[StreamMode, ...] = ("winner", "leader", "none")
Need = Literal["steering", "guidance"]


class Options(BaseModel):
    """Base of every strategy's parameters: frozen, strict, and a misspelt name is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    def chains(self) -> int:
        """How many chains may run at once with these options: the weight used for admission."""
        return 1

    def controls(self) -> tuple[Control, ...]:
        """Controls that the strategy will put on jobs with these options: checked before the request is admitted."""
        return ()

    def roles(self) -> Mapping[str, Role]:
        """Roles that these options need beyond the strategy's own, by the parameter that asks: checked likewise."""
        return {}


@dataclass(frozen=True, slots=True)
class Supports:
    """What a request may combine with the strategy; shown in discovery and enforced at the edge.

    `over`: its chains are whole jobs or chains of the engine, so that modifiers may lie below it. `parts`: it writes a
    chain in several jobs, each on the task's prompt and what the chain holds; modifiers that can resume may lie below.
    """

    stream: tuple[StreamMode, ...] = ("winner", "none")
    logprobs: bool = True
    seed: bool = True
    over: bool = False
    parts: bool = False


class Run(Protocol):
    """A strategy: a plain coroutine function, so that it may hold task groups (PEP 789)."""

    def __call__(self, task: Task, engine: Engine, emit: Emit, options: Any) -> Awaitable[Answer]:
        """Run the task to its answer; raises ReasoningError."""
        ...


@dataclass(frozen=True, slots=True)
class Entry:
    """What is registered: its slug, its name for people, what it does in one line, its options model."""

    id: str
    title: str
    summary: str
    options: type[Options]

    @property
    def defaults(self) -> dict[str, Any]:
        """What holds for parameters that are left out, as JSON; required ones are not in it."""
        return self.options.model_construct().model_dump(mode="json")


@dataclass(frozen=True, slots=True)
class Strategy(Entry):
    """A registered strategy and its coroutine. `needs` are abilities of the engine beyond the models of its roles."""

    run: Run
    reference: str | None = None
    version: str = "1"
    aliases: tuple[str, ...] = ()
    roles: tuple[Role, ...] = ("target",)
    supports: Supports = Supports()
    needs: tuple[Need, ...] = ()


_strategies: dict[str, Strategy] = {}
R = TypeVar("R", bound=Run)


def strategy(
    id: str,
    *,
    title: str | None = None,
    options: type[Options],
    reference: str | None = None,
    aliases: tuple[str, ...] = (),
    roles: tuple[Role, ...] = ("target",),
    supports: Supports = Supports(),
    needs: tuple[Need, ...] = (),
) -> Callable[[R], R]:
    """Register the decorated `run`; the first line of its docstring is the summary. ValueError on a bad or taken id."""
    slug(id)

    def register(run: R) -> R:
        entry = Strategy(id, title or id, summary(run), options, run, reference, "1", aliases, roles, supports, needs)
        for name in (id, *aliases):
            known = _strategies.get(name)
            if known is not None:
                raise ValueError(f"strategy name {name!r} is already taken")
            _strategies[name] = entry
        return run

    return register


def slug(id: str) -> None:
    """ValueError if an id is not what a header and a URL can carry."""
    if not re.fullmatch(r"[a-z][a-z0-9-]{0,31}", id):
        raise ValueError(f"id {id!r} is not a slug")


def summary(registered: object) -> str:
    """The first line of the docstring of what is registered."""
    return (registered.__doc__ or "").strip().split("\n")[0]


@cache
def discover() -> None:
    """Import everything that the entry points name; done once."""
    for point in entry_points(group=GROUP):
        module = importlib.import_module(point.value)
        for found in pkgutil.iter_modules(getattr(module, "__path__", ())):
            importlib.import_module(f"{module.__name__}.{found.name}")


def get(name: str) -> Strategy:
    """The strategy of that id or alias. Raises UnknownStrategy, which knows the nearest name."""
    discover()
    if name not in _strategies:
        raise UnknownStrategy(name, names())
    return _strategies[name]


def names() -> list[str]:
    """All ids, sorted; aliases left out."""
    discover()
    return sorted({entry.id for entry in _strategies.values()})
