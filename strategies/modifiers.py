"""Modifiers: what lies between a strategy and the engine and changes every chain of it, whatever the strategy is.

    short-m-at-k                    the strategy, which knows nothing of what is below
      trimr                         each of its chains ends its thinking once answers agree
        repetition-guard            ... or once it goes in circles
          engine

A modifier is an Engine around an Engine (`splice.Modified`), registered as a strategy is: by a decorator on the class
or function that makes it, in a module that the entry points name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from thinkserve.strategies.engine import Emit, Engine, Role, Task
from thinkserve.strategies.registry import Entry, Options, Strategy, discover, slug, summary
from thinkserve.strategies.splice import Modified


class Make(Protocol):
    """What puts a modifier around the engine of one request."""

    def __call__(self, inner: Engine, task: Task, emit: Emit, options: Any) -> Modified:
        """The engine that the strategy, or the modifier above, gets to see."""
        ...


@dataclass(frozen=True, slots=True)
class Modifier(Entry):
    """A registered modifier; `roles` are the models that it needs beside the target.

    `resumes`: it knows from a job's prompt what it has to know of the chain that the job goes on.
    """

    make: Make
    reference: str | None = None
    roles: tuple[Role, ...] = ()
    resumes: bool = False


@dataclass(frozen=True, slots=True)
class Layer:
    """A modifier with its parameters, as one request wants it."""

    modifier: Modifier
    options: Options


_modifiers: dict[str, Modifier] = {}
M = TypeVar("M", bound=Make)


def modifier(
    id: str,
    *,
    title: str | None = None,
    options: type[Options],
    reference: str | None = None,
    roles: tuple[Role, ...] = (),
    resumes: bool = False,
) -> Callable[[M], M]:
    """Register what it decorates; the first line of its docstring is the summary. ValueError on a bad or taken id."""
    slug(id)

    def register(make: M) -> M:
        if id in _modifiers:
            raise ValueError(f"modifier name {id!r} is already taken")
        _modifiers[id] = Modifier(id, title or id, summary(make), options, make, reference, roles, resumes)
        return make

    return register


def modifiers() -> Mapping[str, Modifier]:
    """All modifiers by id, sorted."""
    discover()
    return dict(sorted(_modifiers.items()))


def misfit(modifier: Modifier, strategy: Strategy) -> str | None:
    """Why the modifier cannot lie below the strategy, in words for the caller; None if it can."""
    supports = strategy.supports
    if supports.over or (supports.parts and modifier.resumes):
        return None
    if supports.parts:
        return f"Modifier {modifier.id!r} follows whole chains; strategy {strategy.id!r} writes each in several jobs"
    return f"Strategy {strategy.id!r} takes no modifiers"


def layered(engine: Engine, task: Task, emit: Emit, layers: Sequence[Layer]) -> tuple[Engine, list[Modified]]:
    """The engine under all layers, the first one on top, and the layers themselves."""
    made: list[Modified] = []
    for layer in reversed(layers):
        made.append(layer.modifier.make(made[-1] if made else engine, task, emit, layer.options))
    return (made[-1] if made else engine), made[::-1]
