"""The breaker: opens after failures in a row, lets one call try again after a while, and closes when that succeeds."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from thinkserve.server.remote_breaker import Breaker


@dataclass
class Clock:
    """Time that passes when told to."""

    now: float = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def opened(clock: Clock) -> Breaker:
    """A breaker of three failures and ten seconds that has just opened."""
    breaker = Breaker(3, 10.0, clock)
    for _ in range(3):
        assert breaker.admit()
        breaker.failed()
    return breaker


def test_failures_in_a_row_open_it(opened: Breaker) -> None:
    """The third of three."""
    assert (True, False) == (opened.open, opened.admit())


def test_a_success_between_failures_keeps_it_closed(clock: Clock) -> None:
    """Two, a success, and two more are not three in a row."""
    breaker = Breaker(3, 10.0, clock)
    for outcome in (breaker.failed, breaker.failed, breaker.succeeded, breaker.failed, breaker.failed):
        outcome()

    assert (False, True) == (breaker.open, breaker.admit())


def test_after_the_pause_one_call_tries(opened: Breaker, clock: Clock) -> None:
    """The others wait for what comes of it."""
    clock.now += 10

    assert not opened.open
    assert [True, False, False] == [opened.admit() for _ in range(3)]
    assert opened.open


def test_a_trial_that_fails_opens_it_again(opened: Breaker, clock: Clock) -> None:
    """For the whole pause from then on."""
    clock.now += 10
    opened.admit()
    clock.now += 5
    opened.failed()
    clock.now += 9

    assert (True, False) == (opened.open, opened.admit())


def test_a_trial_that_succeeds_closes_it(opened: Breaker, clock: Clock) -> None:
    """It takes as many failures as ever to open it again."""
    clock.now += 10
    opened.admit()
    opened.succeeded()
    opened.failed()
    opened.failed()

    assert [True, True] == [opened.admit(), opened.admit()]


def test_a_trial_that_is_answered_lets_others_in_on_probation(opened: Breaker, clock: Clock) -> None:
    """Before it has ended; one more failure is enough to open it again."""
    clock.now += 10
    opened.admit()
    opened.answered()

    assert [True, True] == [opened.admit(), opened.admit()]
    opened.failed()
    assert not opened.admit()


def test_a_trial_that_never_reports_does_not_bar_the_next(opened: Breaker, clock: Clock) -> None:
    """It was cancelled; after another pause the next one tries."""
    clock.now += 10
    opened.admit()
    clock.now += 10

    assert [True, False] == [opened.admit(), opened.admit()]
