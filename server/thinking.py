"""Where thinking stands in a prompt: what every adapter to an engine must know of it, told by the tags alone."""

from __future__ import annotations

from collections.abc import Callable

from thinkserve.strategies.engine import Job, ModelInfo, Phase, Tokens
from thinkserve.strategies.errors import BadOptions, Unsupported
from thinkserve.strategies.text import last_tags


def phase_of(info: ModelInfo, tokens: Tokens, blank: Callable[[Tokens], bool]) -> Phase | None:
    """Where generation starts: behind an open tag, behind a closed one, or wherever the model likes.

    `blank` tells whether some tokens are nothing but white space: after any other text a tag says nothing.
    """
    opened, closed = last_tags(info, tokens)
    last = max(opened, closed)
    if last < 0 or not blank(tokens[last + 1 :]):
        return None
    return "thinking" if opened > closed else "answer"


def closing(info: ModelInfo, phase: Phase | None, gap: Tokens) -> Tokens:
    """What turns thinking off where the chat template has not: an empty think block; `gap` is a blank line."""
    if phase == "answer" or not info.reasons:
        return ()
    opening = () if phase == "thinking" else (*info.think_open, *gap)
    return (*opening, *info.think_close, *gap)


def vllm_budget(job: Job, info: ModelInfo) -> int | None:
    """The job's thinking budget as vLLM counts it: from the last opening tag of the prompt. Raises Unsupported."""
    if job.thinking_budget is None:
        return None
    if job.thinking_budget < 0:
        raise BadOptions("The thinking budget must not be negative.", "thinking_budget")
    if not info.reasons:
        message = "This model does not mark its thinking, so it takes no thinking budget."
        raise Unsupported(message, "thinking_budget")
    opened, closed = last_tags(info, job.prompt)
    before = len(job.prompt) - opened - len(info.think_open) if opened > closed else 0
    return job.thinking_budget + before
