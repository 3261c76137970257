"""The bench's intervals against closed forms and published values."""

from __future__ import annotations

from math import exp, inf, sqrt
from random import Random

import pytest

from bench import stats


def test_wilson_matches_the_published_example() -> None:
    """Newcombe (1998), method 3: 81 of 263 gives 0.2553 to 0.3662."""
    found = stats.wilson(81, 263)

    assert (round(found.low, 4), round(found.high, 4)) == (0.2553, 0.3662)
    assert pytest.approx(81 / 263) == found.value


@pytest.mark.parametrize("trials", [1, 10, 300])
def test_wilson_at_the_ends_has_its_closed_form(trials: int) -> None:
    """Without a success the upper end is z^2 / (n + z^2); all successes mirror that."""
    end = stats.Z95**2 / (trials + stats.Z95**2)
    none, every = stats.wilson(0, trials), stats.wilson(trials, trials)

    assert pytest.approx((0.0, end)) == (none.low, none.high)
    assert pytest.approx((1 - end, 1.0)) == (every.low, every.high)


@pytest.mark.parametrize(("successes", "trials"), [(-1, 5), (6, 5), (0, 0)])
def test_wilson_refuses_impossible_counts(successes: int, trials: int) -> None:
    """More successes than trials, or no trials, is an error and no interval."""
    with pytest.raises(ValueError, match="successes in"):
        stats.wilson(successes, trials)


def test_mean_of_equal_values_has_no_width() -> None:
    """Resampling a constant gives the constant."""
    assert stats.Interval(3.0, 3.0, 3.0) == stats.mean([3.0] * 20)


def test_mean_interval_approaches_the_normal_one() -> None:
    """For many values the bootstrap's half width is 1.96 s / sqrt(n)."""
    random = Random(1)
    values = [random.gauss(10, 2) for _ in range(400)]
    average = sum(values) / 400
    normal = stats.Z95 * sqrt(sum((value - average) ** 2 for value in values) / 400) / sqrt(400)

    found = stats.mean(values)

    assert pytest.approx(average) == found.value
    assert pytest.approx(normal, rel=0.05) == (found.high - found.low) / 2


def test_of_a_few_pairs_the_interval_is_students() -> None:
    """ln 1.1 and ln 1.2 have a mean of 0.1388 and a deviation of 0.0615: 12.706 / sqrt 2 of it to either side."""
    found = stats.ratio_of_few([1.1, 2.4], [1.0, 2.0])

    assert pytest.approx((1.1489, 0.6611, 1.9967), abs=2e-3) == (found.value, found.low, found.high)
    assert (0, inf) == (stats.ratio_of_few([1.0], [2.0]).low, stats.ratio_of_few([1.0], [2.0]).high)


@pytest.mark.parametrize("pairs", [2, 3, 5])
def test_so_many_of_the_intervals_of_a_few_pairs_hold_the_truth(pairs: int) -> None:
    """95 % of them; those of the bootstrap would be half to three quarters."""
    rng = Random(1)
    held = 0
    for _ in range(2000):
        ours = [exp(rng.gauss(0, 0.1)) for _ in range(pairs)]
        found = stats.ratio_of_few(ours, [1.0] * pairs)
        held += found.low <= 1 <= found.high

    assert pytest.approx(0.95, abs=0.02) == held / 2000


def test_paired_ratio_of_proportional_rows_is_exact() -> None:
    """When every value is double its partner the ratio is 2 whatever is resampled."""
    values = [1.0, 5.0, 2.0, 9.0]

    found = stats.paired_ratio([2 * value for value in values], values)

    assert pytest.approx((2.0, 2.0, 2.0)) == (found.value, found.low, found.high)


def test_paired_difference_of_shifted_rows_is_exact() -> None:
    """What is common to both rows cancels, however much it varies."""
    assert stats.Interval(-0.5, -0.5, -0.5) == stats.paired_difference([0.5, 8.0, 3.5], [1.0, 8.5, 4.0])


def test_pairing_narrows_the_interval() -> None:
    """Rows that vary together give a narrower ratio than the same values in another order."""
    random = Random(2)
    hard = [random.uniform(1, 10) for _ in range(100)]
    noisy = [value * random.uniform(0.9, 1.1) for value in hard]
    paired, mixed = stats.paired_ratio(noisy, hard), stats.paired_ratio(sorted(noisy), hard)

    assert paired.high - paired.low < (mixed.high - mixed.low) / 2


def test_rows_of_different_length_do_not_pair() -> None:
    """A missing problem is an error, not a shifted pairing."""
    with pytest.raises(ValueError, match="do not pair"):
        stats.paired_ratio([1.0, 2.0], [1.0])


def test_intervals_are_reproducible() -> None:
    """The same values give the same interval: the report can be printed again."""
    assert stats.mean([1.0, 2.0, 4.0]) == stats.mean([1.0, 2.0, 4.0])
