"""Equality of answers: by text, by number, by algebra in a process that may be killed."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from fractions import Fraction
from time import monotonic

import anyio
import pytest
from anyio.to_thread import current_default_thread_limiter, run_sync
from hypothesis import given
from hypothesis import strategies as st

from thinkserve.strategies.equivalence import Equivalence, normalise, number, same_text_or_number
from thinkserve.strategies.worker import Worker

pytestmark = pytest.mark.anyio

SLEEPER = "print('\"ready\"', flush=True)\nimport time\nwhile input(): time.sleep(99)"
ECHO = "print('\"ready\"', flush=True)\nwhile True: print('true' if 'a' in input() else 'false', flush=True)"
POISON = ["$10^{10^{10}}$", "+".join(f"x^{n}" for n in range(250)), "(" * 900 + "1" + ")" * 900]


@pytest.fixture(scope="module")
def worker_for_all() -> Iterator[Equivalence]:
    """One worker for the whole file; needs math-verify."""
    pytest.importorskip("math_verify")
    equivalence = Equivalence(worker=Worker())
    yield equivalence
    equivalence.close()


@pytest.fixture
def algebra(worker_for_all: Equivalence) -> Equivalence:
    """Time enough for every verdict, however busy the machine."""
    worker_for_all.time_limit = 60.0
    return worker_for_all


@pytest.fixture
def hasty(worker_for_all: Equivalence) -> Equivalence:
    """No time for what would take for ever anyway."""
    worker_for_all.time_limit = 0.5
    return worker_for_all


@pytest.mark.parametrize(
    ("a", "b", "equal"),
    [
        ("5", "5", True),
        ("$5$", r"\( 5 \)", True),
        ("5.", "5", True),
        ("1/2", "0.5", True),
        (r"\frac12", "0.50", True),
        (r"\dfrac{1}{2}", "2/4", True),
        (r"-\frac{1}{2}", "-.5", True),
        ("1,234", "1234.0", True),
        ("1e3", "1000", True),
        (r"\$18", "18", True),
        ("2 1/2", "2.5", True),
        (r"-2\frac12", "-5/2", True),
        ("2 1/2", "21/2", False),
        ("2 1/2", "3 1/2", False),
        ("12 345", "12345", True),
        ("50 %", "50%", True),
        (r"50\%", "0.5", False),
        (r"50\%", "50", True),
        ("\u22127", "-7", True),
        ("7", "-7", False),
        ("0.333", "1/3", False),
        ("1/0", "1/0", True),
        (r"\text{Yes}", "yes", True),
        ("(B)", "B", True),
        ("x", "X", True),
        ("dog", "god", False),
        (r"90^\circ", "90", True),
        ("9" * 5000, "9" * 5000, True),
        ("9" * 5000, "9" * 5001, False),
    ],
)
def test_most_answers_need_no_algebra(a: str, b: str, equal: bool) -> None:
    """Text and exact numbers decide, either way round."""
    assert (equal, equal) == (same_text_or_number(a, b), same_text_or_number(b, a))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e999", Fraction(10**999)),
        ("1e9999", None),
        ("9" * 201, None),
        ("10^{10}", None),
        ("1,23", None),
        ("1,234.5", Fraction(2469, 2)),
        ("1 2 3", None),
        ("+3", Fraction(3)),
        ("3/0", None),
        (r"\frac{1}{0}", None),
        ("", None),
    ],
)
def test_numbers_are_exact_and_bounded(text: str, value: Fraction | None) -> None:
    """Nothing huge is ever computed."""
    assert value == number(text)


@given(st.fractions(max_denominator=1000))
def test_every_fraction_is_read_back(value: Fraction) -> None:
    """In plain and in LaTeX writing."""
    sign = "-" if value < 0 else ""

    assert value == number(normalise(f"{value.numerator}/{value.denominator}"))
    assert value == number(normalise(rf"{sign}\dfrac{{{abs(value.numerator)}}}{{{value.denominator}}}"))


@given(st.text(alphabet=r"\frac{}()$.,1 5%xX-", max_size=12), st.text(alphabet=r"\frac{}()$.,1 5%xX-", max_size=12))
def test_equality_is_symmetric(a: str, b: str) -> None:
    """Also of nonsense; and everything equals itself."""
    assert same_text_or_number(a, b) == same_text_or_number(b, a)
    assert same_text_or_number(a, a) is True


@pytest.mark.parametrize(
    ("a", "b", "equal"),
    [
        ("x=5", "5", True),
        (r"\sqrt{8}", r"2\sqrt{2}", True),
        ("1<x<2", "(1,2)", True),
        ("x^2+1", "x^2+2", False),
        ("(x+1)^2", "x^2+2x+1", True),
    ],
)
async def test_algebra_decides_the_rest(algebra: Equivalence, a: str, b: str, equal: bool) -> None:
    """The verdict does not depend on which answer comes first."""
    assert (equal, equal) == (await algebra.equal(a, b), await Equivalence.equal(algebra, b, a))


@pytest.mark.parametrize("poison", POISON, ids=["tower", "sum", "brackets"])
async def test_poison_costs_the_time_limit_at_most(hasty: Equivalence, poison: str) -> None:
    """Whatever math-verify makes of it, an answer comes in time, and the next comparison works."""
    await hasty.warm()
    with anyio.fail_after(5):
        assert not await hasty.equal(poison, r"\sqrt{7}")

    hasty.time_limit = 60.0
    assert await hasty.equal(rf"\sqrt{{12}}+{len(poison)}", rf"2\sqrt{{3}}+{len(poison)}")


async def test_a_megabyte_of_latex_is_not_looked_at(algebra: Equivalence) -> None:
    """Longer than the limit: equal only if identical, and at once."""
    long = r"\frac{1}{" * 110_000

    with anyio.fail_after(0.5):
        assert not await algebra.equal(long, long + "x")
        assert await algebra.equal(long, str(long))


async def test_without_a_worker_that_stage_is_skipped() -> None:
    """Text and numbers still work."""
    plain = Equivalence()

    assert await plain.equal("1/2", "0.5")
    assert not await plain.equal("x=5", "5")


async def test_verdicts_are_remembered(algebra: Equivalence) -> None:
    """A second look needs no worker, in either order."""
    assert await algebra.equal("y=9", "9")
    algebra.close()

    with anyio.fail_after(0.2):
        assert await algebra.equal("9", "y=9")


async def test_the_event_loop_goes_on_while_algebra_is_stuck(hasty: Equivalence) -> None:
    """Comparing happens beside the loop, not in it."""
    await hasty.warm()
    ticks = 0

    async with anyio.create_task_group() as group:

        async def tick() -> None:
            nonlocal ticks
            while True:
                await anyio.sleep(0.01)
                ticks += 1

        group.start_soon(tick)
        await hasty.equal("10^{10^{11}}", "z=1")
        group.cancel_scope.cancel()

    assert ticks > 5


async def test_waiting_comparisons_hold_no_threads_of_others(hasty: Equivalence) -> None:
    """Many may wait for the worker; the threads that everybody shares stay free."""
    await hasty.warm()
    async with anyio.create_task_group() as group:
        for n in range(3):
            group.start_soon(hasty.equal, f"10^{{10^{{2{n}}}}}", "z=4")
        await anyio.sleep(0.1)
        borrowed = current_default_thread_limiter().borrowed_tokens
        group.cancel_scope.cancel()

    assert borrowed == 0


async def test_a_vote_runs_out_of_patience(algebra: Equivalence) -> None:
    """After the seconds it was granted, text and number alone decide; what was not asked to the end is not known."""
    await algebra.warm()
    equal = algebra.patient(seconds=0.5)

    with anyio.fail_after(5):
        assert not await equal("10^{10^{12}}", "z=2")
        assert not await equal(r"\sqrt{20}", r"2\sqrt{5}")
        assert await equal("1/4", "0.25")
    assert await algebra.equal(r"\sqrt{20}", r"2\sqrt{5}")


@pytest.fixture
def stuck() -> Iterator[Equivalence]:
    """A worker that never answers, and a minute for each of its answers."""
    equivalence = Equivalence(60.0, Worker((sys.executable, "-c", SLEEPER)))
    yield equivalence
    equivalence.close()


async def test_a_vote_does_not_wait_behind_the_hard_answers_of_others(stuck: Equivalence) -> None:
    """The wait for the worker counts as well."""
    equal, passed = stuck.patient(seconds=0.3), False
    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            for n in range(3):
                group.start_soon(stuck.equal, f"10^{{10^{{{n}}}}}", "z=1")
            await anyio.sleep(0.05)
            assert not await equal("x=5", "5")
            passed = await equal("1/4", "0.25")
            group.cancel_scope.cancel()

    assert passed


async def test_a_vote_leaves_time_before_its_deadline(stuck: Equivalence) -> None:
    """Whoever is cancelled in a second is not kept for three."""
    with anyio.move_on_after(1.0) as scope:
        assert not await stuck.patient()("x=5", "5")

    assert not scope.cancelled_caught


async def test_a_question_for_which_nobody_waits_is_not_asked() -> None:
    """Its asker may have gone while the worker started or was busy; the process is left as it is."""
    worker = Worker((sys.executable, "-c", ECHO))
    await run_sync(worker.start)
    first = worker.pid

    assert await run_sync(worker.ask, ["a"], 5.0, monotonic() - 1) is None
    assert first == worker.pid
    assert await run_sync(worker.ask, ["a"], 5.0, monotonic() + 5) is True
    worker.stop()


async def test_a_question_is_not_waited_for_beyond_the_askers_time() -> None:
    """However long the worker may take for it."""
    worker = Worker((sys.executable, "-c", SLEEPER))
    await run_sync(worker.start)

    with anyio.fail_after(5):
        assert await run_sync(worker.ask, ["a"], 60.0, monotonic() + 0.1) is None


async def test_a_late_worker_is_killed_and_replaced() -> None:
    """None for the late answer; the old process is gone, the next question gets a new one."""
    worker = Worker((sys.executable, "-c", SLEEPER))
    await run_sync(worker.start)
    first = worker.pid

    assert await run_sync(worker.ask, ["x"], 0.1) is None
    assert worker.pid is None
    assert await run_sync(worker.start)
    assert first != worker.pid
    worker.stop()
    assert first is not None
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)


async def test_a_worker_answers_and_is_reused() -> None:
    """One process for many questions; ended by `stop`."""
    worker = Worker((sys.executable, "-c", ECHO))

    answers = [await run_sync(worker.ask, [text], 5.0) for text in ("a", "b", "a")]

    assert [True, False, True] == answers
    worker.stop()
    assert worker.pid is None


async def test_a_worker_that_dies_is_replaced() -> None:
    """The next question does not notice that the process has crashed."""
    worker = Worker((sys.executable, "-c", ECHO))
    await run_sync(worker.start)
    assert worker.pid is not None
    os.kill(worker.pid, 9)
    await run_sync(os.waitid, os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)

    assert await run_sync(worker.ask, ["a"], 5.0) is True
    worker.stop()


async def test_a_worker_that_does_not_start_gives_no_answer() -> None:
    """Neither when it ends at once nor when it never says that it is ready."""
    for program in ("pass", "import time; time.sleep(99)"):
        worker = Worker((sys.executable, "-c", program), start_limit=0.5)

        assert await run_sync(worker.ask, ["a"], 1.0) is None
        assert worker.pid is None


async def test_stopping_frees_whoever_waits() -> None:
    """`stop` from another thread ends the wait."""
    worker = Worker((sys.executable, "-c", SLEEPER))
    await run_sync(worker.start)

    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            group.start_soon(run_sync, lambda: worker.ask(["x"], 60.0))
            await anyio.sleep(0.1)
            await run_sync(worker.stop)
