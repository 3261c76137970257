"""Lengths for models large and small: papers give theirs for models that think for thousands of tokens."""

from __future__ import annotations

# Of a smaller context every published length has its share.
FULL_CONTEXT = 8192


def scaled(published: int, context: int, least: int = 1) -> int:
    """A published number of tokens (or of events that come with them) for a model with this context."""
    return max(least, round(published * min(1.0, context / FULL_CONTEXT)))
