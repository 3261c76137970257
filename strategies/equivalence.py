"""Whether two answers are the same: as normalised text, else as exact numbers, else as math-verify sees it.

The third stage runs in a process of its own under a time limit, see math_worker.py; it is skipped when math-verify is
not installed, and what it cannot decide in time counts as different. A vote has one time for all of it, so that nobody
waits long behind another's hard answers. Equality is symmetric; a percent sign is a unit, so 50% equals 50 and not 0.5.
"""

from __future__ import annotations

import atexit
import math
import re
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from fractions import Fraction
from functools import cache, partial
from importlib.util import find_spec

from anyio import CapacityLimiter, current_effective_deadline, current_time, move_on_after, to_thread
from anyio.lowlevel import RunVar

from thinkserve.strategies.worker import Worker

# Longer answers are the same only if they are the same text.
MAX_CHARS = 2000
MAX_DIGITS = 200
CACHE_SIZE = 4096
# Seconds of algebra in one vote, the wait for the worker included.
VOTE_S = 3.0


class Equivalence:
    """Compares answers; one worker process, started when first needed and kept warm; `time_limit` in seconds.

    Without a worker there is no algebra.
    """

    def __init__(self, time_limit: float = 2.0, worker: Worker | None = None) -> None:
        self.time_limit = time_limit
        self._worker = worker
        self._known: OrderedDict[tuple[str, str], bool] = OrderedDict()

    async def equal(self, a: str, b: str, until: float = math.inf) -> bool:
        """Whether the answers are the same; takes the time limit at most, once the worker is there and free.

        It is not waited for beyond `until`, a time on the monotonic clock.
        """
        return bool(await self.decide(a, b, until))

    async def decide(self, a: str, b: str, until: float = math.inf) -> bool | None:
        """As `equal`, and None when math-verify ran out of time, died or did not start."""
        verdict = same_text_or_number(a, b)
        if verdict is not None or self._worker is None:
            return bool(verdict)
        first, second = sorted((normalise(a), normalise(b)))
        if (first, second) in self._known:
            self._known.move_to_end((first, second))
            return self._known[first, second]
        ask = partial(self._worker.ask, [first, second], self.time_limit, until)
        with move_on_after(until - time.monotonic()):
            if not await self.warm():
                return None  # says nothing of these two: not to be remembered
            answer = await to_thread.run_sync(ask, abandon_on_cancel=True, limiter=_one_at_a_time())
            if answer is not None or time.monotonic() < until:
                self._remember((first, second), bool(answer))
            return answer
        return None

    def _remember(self, pair: tuple[str, str], verdict: bool) -> None:
        self._known[pair] = verdict
        if len(self._known) > CACHE_SIZE:
            self._known.popitem(last=False)

    def patient(self, seconds: float = VOTE_S) -> Callable[[str, str], Awaitable[bool]]:
        """An `equal` for one vote that begins now: after so many seconds it looks at text and numbers only.

        Where the caller will be cancelled before, algebra ends half-way to there.
        """
        left = (current_effective_deadline() - current_time()) / 2
        return partial(self.equal, until=time.monotonic() + min(seconds, left))

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
    equivalence = Equivalence(worker=Worker() if find_spec("math_verify") else None)
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
    if not _MATHS.search(text):
        return " ".join(text.casefold().split())
    # What stands between two digits tells numbers apart.
    return _APART.sub("", " ".join(_MIXED.sub(_improper, text).split()))


def _improper(mixed: re.Match[str]) -> str:
    """2 1/2 as 5/2."""
    whole, top, bottom = mixed["whole"], mixed["top"] or mixed["over"], mixed["bottom"] or mixed["under"]
    return f"{int(whole) * int(bottom) + int(top)}/{bottom}"


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
    (re.compile(r"\\([%$#&_])"), r"\1"),
    (re.compile(r"\\[()\[\]!,;: ]|\\(?:left|right|quad|qquad)(?![A-Za-z])|\$|~|\^\{?\\circ\}?|\u00b0"), " "),
    (re.compile(r"\\[dt]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\frac\s*(\d)\s*(\d)"), r"\\frac{\1}{\2}"),
    (re.compile(r"^\s*\(([A-Za-z])\)\s*$"), r"\1"),
]
# A whole number before a proper way to write a fraction, in digits that stay within bounds.
_MIXED = re.compile(
    r"(?<![\d.,/^_])(?P<whole>\d{1,9})(?:\s*\\frac\{(?P<top>\d{1,9})\}\{(?P<bottom>\d{1,9})\}"
    r"|\s+(?P<over>\d{1,9})\s*/\s*(?P<under>\d{1,9})(?![\d.,]))"
)
# White space but between two digits, unless they are of groups of thousands.
_APART = re.compile(r"(?<!\d)\s|\s(?!\d)|(?<=\d)\s(?=\d{3}(?!\d))")
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
