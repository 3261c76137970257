"""Tiny models on one thread, not compiled: that would take longer than what they do."""

from __future__ import annotations

import pytest

from tests.one_thread import one_thread
from thinkserve.train.model import Layer

__all__ = ["one_thread"]


@pytest.fixture(autouse=True)
def _not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Layer, "compile", lambda _layer, **_options: None)
