"""The process that runs math-verify: `python -m thinkserve.strategies.math_worker`, one JSON line in, one out.

math-verify can loop for ever or fill memory on hostile input, and its own timeouts need signals in the main thread: so
it gets a process of its own, which its parent kills when an answer is late. Started and spoken to by equivalence.py.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from functools import lru_cache
from typing import Any

MEMORY_BYTES = 2 << 30
# Should the parent die meanwhile, a stuck worker still ends.
ALARM_S = 30


def main() -> None:
    """Answer `[a, b]` with `true` or `false` until standard input ends; `"ready"` comes first."""
    # Nothing that the libraries print may enter the protocol.
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    from math_verify import parse, verify  # type: ignore[import-untyped,unused-ignore]

    @lru_cache(maxsize=512)
    def parsed(text: str) -> list[Any]:
        return list(parse(f"${text}$", parsing_timeout=None))

    def equal(a: str, b: str) -> bool:
        left, right = parsed(a), parsed(b)
        # `verify` knows a gold answer and a guess; a vote knows neither, so either way round will do.
        return bool(verify(left, right, timeout_seconds=None) or verify(right, left, timeout_seconds=None))

    equal("1+x", "x+1")
    replies.write('"ready"\n')
    for line in sys.stdin:
        signal.alarm(ALARM_S)
        try:
            verdict = equal(*json.loads(line))
        except Exception:  # noqa: BLE001  # whatever a hostile answer does to the parser, it is not equal
            verdict = False
        signal.alarm(0)
        replies.write(json.dumps(verdict) + "\n")


if __name__ == "__main__":
    main()
