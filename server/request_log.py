"""One line per request, for people or as JSON; never a word of what was asked or answered."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping

from thinkserve.server.plan import Plan, Usage

logger = logging.getLogger("thinkserve.request")


class RequestLog:
    """Writes to the logger `thinkserve.request`."""

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json

    def request(self, plan: Plan, usage: Usage, outcome: str, client: Mapping[str, object]) -> None:
        """Log a request that got to work, when it is over."""
        if not logger.isEnabledFor(logging.INFO):
            return
        fields: dict[str, object] = {
            "id": plan.request_id,
            **client,
            "strategy": plan.strategy.id,
            "preset": plan.preset,
            "outcome": outcome,
            "prompt_tokens": usage.prompt_tokens,
            "cached_tokens": usage.cached_tokens,
            "completion_tokens": usage.completion_tokens,
            "wasted_tokens": usage.wasted_tokens,
            "chains": [usage.chains_started, usage.chains_finished, usage.chains_aborted],
            "wall_ms": round(usage.wall_ms, 1),
            "ttft_ms": None if usage.ttft_ms is None else round(usage.ttft_ms, 1),
        }
        logger.info("%s", self._line({name: value for name, value in fields.items() if value is not None}))

    def _line(self, fields: Mapping[str, object]) -> str:
        if self._as_json:
            return json.dumps({"event": "request", **fields})
        return " ".join(f"{name}={value}" for name, value in fields.items())
