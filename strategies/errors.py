"""What can go wrong, in words that a strategy understands.

ReasoningError
├── BadOptions        the caller's parameters make no sense together (400, with the parameter's name)
├── Unsupported       this deployment lacks what is asked for: a role, a feature (400)
├── UnknownStrategy   no strategy of that name (400)
├── TooLong           prompt and completion do not fit the model's context (400)
├── Unforgiven        a helper's failure by which the caller wants the request to end (as what it was)
└── EngineFailed      the engine could not go on with a request
    └── EngineDead    the engine is gone for all requests
"""

from __future__ import annotations

from difflib import get_close_matches


class ReasoningError(Exception):
    """Base of all errors that a strategy or an engine may raise; the message is meant for the caller."""


class BadOptions(ReasoningError):
    """Options that cannot be carried out; `param` is the dotted path below the strategy's parameters."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class Unsupported(ReasoningError):
    """A role or feature that this deployment does not have; `param` names the request field that asked for it."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class UnknownStrategy(ReasoningError, KeyError):
    """No such strategy; `nearest` is the closest name that exists."""

    def __init__(self, name: str, known: list[str]) -> None:
        self.name = name
        self.known = known
        self.nearest = next(iter(get_close_matches(name, known, n=1, cutoff=0.4)), None)
        hint = f" Did you mean {self.nearest!r}?" if self.nearest else ""
        super().__init__(f"Unknown strategy {name!r}.{hint} Available: {', '.join(known)}.")

    def __str__(self) -> str:
        return str(self.args[0])


class TooLong(ReasoningError):
    """`tokens` in the prompt against a `context` that cannot hold them and one token more."""

    def __init__(self, tokens: int, context: int) -> None:
        super().__init__(f"The prompt has {tokens} tokens; the model's context is {context}.")
        self.tokens = tokens
        self.context = context


class Unforgiven(ReasoningError):
    """The failure of a model that helps, below a strategy that would get over it, where the caller said "fail"."""

    def __init__(self, failure: ReasoningError) -> None:
        super().__init__(str(failure))
        self.failure = failure


class EngineFailed(ReasoningError):
    """The engine gave up on one request."""


class EngineDead(EngineFailed):
    """The engine process is gone; no request can be served any more."""


# What a model that helps raises when it does not do its part: a request may go on without it.
Lost = EngineFailed | TooLong | Unsupported
LOST = (EngineFailed, TooLong, Unsupported)


def leading(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error that stands for those that ended a task group: ours before others, the earliest of each."""
    found: BaseException = errors.subgroup(ReasoningError) or errors
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    return found
