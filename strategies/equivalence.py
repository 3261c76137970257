"""Whether two answers are the same: as normalised text, else as exact numbers, else as math-verify sees it.

The third stage runs in a process of its own under a time limit, see math_worker.py; it is skipped when math-verify is
not installed, and what it cannot decide in time counts as different. Equality is symmetric; a percent sign is a unit,
so 50% equals 50 and not 0.5.
"""

from __future__ import annotations

import atexit
import re
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from fractions import Fraction
from functools import cache, partial
from importlib.util import find_spec

from anyio import CapacityLimiter, to_thread
from anyio.lowlevel import RunVar

from thinkserve.strategies.worker import Worker

# Longer answers are the same only if they are the same text.
MAX_CHARS = 2000
MAX_DIGITS = 200
CACHE_SIZE = 4096


class Equivalence:
    """Compares answers; one worker process, started when first needed and kept warm; `time_limit` in seconds."""

    def __init__(self, time_limit: float = 2.0, *, math: bool = True) -> None:
        self.time_limit = time_limit
        self._worker = Worker() if math and find_spec("math_verify") else None
        self._known: OrderedDict[tuple[str, str], bool] = OrderedDict()

    async def equal(self, a: str, b: str) -> bool:
        """Whether the answers are the same; takes the time limit at most, once the worker runs."""
        return bool(await self.decide(a, b))

    async def decide(self, a: str, b: str) -> bool | None:
        """As `equal`, and None when math-verify ran out of time, died or did not start."""
        verdict = same_text_or_number(a, b)
        if verdict is not None or self._worker is None:
            return bool(verdict)
        first, second = sorted((normalise(a), normalise(b)))
        if (first, second) in self._known:
            self._known.move_to_end((first, second))
            return self._known[first, second]
        if not await self.warm():
            return None  # says nothing of these two: not to be remembered
        ask = partial(self._worker.ask, [first, second], self.time_limit)
        answer = await to_thread.run_sync(ask, abandon_on_cancel=True, limiter=_one_at_a_time())
        self._known[first, second] = bool(answer)
        if len(self._known) > CACHE_SIZE:
            self._known.popitem(last=False)
        return answer

    def patient(self, timeouts: int = 3) -> Callable[[str, str], Awaitable[bool]]:
        """An `equal` for one vote: after so many time-outs it looks at text and numbers only."""
        left = timeouts

        async def equal(a: str, b: str) -> bool:
            nonlocal left
            if left <= 0:
                return bool(same_text_or_number(a, b))
            verdict = await self.decide(a, b)
            left -= verdict is None
            return bool(verdict)

        return equal

    async def warm(self) -> bool:
        """Start the worker now, so that the first vote need not wait for it; whether it runs."""
        if self._worker is None:
            return False
        return await to_thread.run_sync(self._worker.start, abandon_on_cancel=True, limiter=_one_at_a_time())

    def close(self) -> None:
        """End the worker; a later comparison starts a new one."""
        if self._worker is not None:
            self._worker.stop()


@cache
def shared() -> Equivalence:
    """The one of this process; its worker ends with it."""
    equivalence = Equivalence()
    atexit.register(equivalence.close)
    return equivalence


def same_text_or_number(a: str, b: str) -> bool | None:
    """What can be said without algebra; None when algebra has to say."""
    if a == b:
        return True
    if max(len(a), len(b)) > MAX_CHARS:
        return False
    first, second = normalise(a), normalise(b)
    if first == second:
        return True
    left, right = number(first), number(second)
    if left is not None and right is not None:
        return left == right
    # To math-verify a word is a product of its letters, and "dog" equals "god".
    return None if _MATHS.search(first) and _MATHS.search(second) else False


def normalise(answer: str) -> str:
    r"""The answer without what does not matter: delimiters, spacing, `\text{}`, kind of fraction, case of words."""
    text = answer
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = text.strip().removesuffix(".").rstrip()
    return "".join(text.split()) if _MATHS.search(text) else " ".join(text.casefold().split())


def number(text: str) -> Fraction | None:
    """The exact value of a normalised answer that is a plain number or fraction; None for all else."""
    found = _NUMBER.fullmatch(text) if len(text) <= MAX_DIGITS else None
    if found is None:
        return None
    sign = -1 if found["sign"] == "-" else 1
    if found["top"]:
        bottom = int(found["bottom"])
        return Fraction(sign * int(found["top"]), bottom) if bottom else None
    value = Fraction(found["plain"].replace(",", "") + (f"e{found['exponent']}" if found["exponent"] else ""))
    over = Fraction(found["over"] or 1)
    return sign * value / over if over else None


_MATHS = re.compile(r"[\d\\^_=<>+*/{}()\[\]]")
_REWRITES: list[tuple[re.Pattern[str], str]] = [
    (re.compile(r"[\u2212\u2013]"), "-"),
    (re.compile(r"\\(?:text|textbf|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\\[()\[\]!,;: ]|\\(?:left|right|quad|qquad)(?![A-Za-z])|\$|~|\^\{?\\circ\}?|\u00b0"), " "),
    (re.compile(r"\\[dt]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\frac\s*(\d)\s*(\d)"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\([%$#&_])"), r"\1"),
    (re.compile(r"^\s*\(([A-Za-z])\)\s*$"), r"\1"),
]
_NUMBER = re.compile(
    r"(?P<sign>[-+]?)(?:\\frac\{(?P<top>\d+)\}\{(?P<bottom>\d+)\}"
    r"|(?P<plain>(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+)(?:[eE](?P<exponent>[-+]?\d{1,3}))?(?:/(?P<over>\d+))?)%?"
)


_limiter: RunVar[CapacityLimiter] = RunVar("thinkserve.equivalence")


def _one_at_a_time() -> CapacityLimiter:
    """The worker answers one question at a time; whoever waits does so in the event loop, not in a thread."""
    try:
        return _limiter.get()
    except LookupError:
        limiter = CapacityLimiter(1)
        _limiter.set(limiter)
        return limiter
