"""The budget bench: its figures are what they say, and its chart is a chart."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest

from bench.budget import Limited, cells, cut_for, plot, rows_of, verdicts
from bench.chart import Series, chart, ticks
from bench.inprocess import Measured, Row, Sample


def limited(way: str, budget: int | None, lengths: list[int], right: int) -> Limited:
    """A row with so many right answers."""
    samples = [Sample(index < right, "7", length, length + 9, 0.5, {}) for index, length in enumerate(lengths)]
    return Limited(way, budget, Measured(Row(f"{way} {budget}"), samples))


DONE = [
    limited("unlimited", None, [100, 200, 300, 400], 4),
    limited("guidance", 100, [90, 100, 110, 100], 4),
    limited("hard end, same mean", 100, [100, 100, 100, 100], 1),
    limited("hard end", 100, [100, 100, 100, 100], 1),
]


@pytest.mark.parametrize(("mean", "cut"), [(100, 100), (200, 250), (250, 400), (1, 1)])
def test_the_cut_gives_unlimited_chains_the_mean_that_is_wanted(mean: float, cut: int) -> None:
    """Smallest b with mean(min(L, b)) at least that."""
    assert cut == cut_for(mean, [100, 200, 300, 400])


def test_off_is_the_mean_deviation_from_the_budget() -> None:
    """Over problems, as a share of the budget; unlimited rows have none."""
    assert 0.05 == pytest.approx(DONE[1].off)
    assert None is DONE[0].off
    assert ["0.050", "0.000"] == cells(DONE[1])[-2:]


def test_the_targets_are_judged_at_the_budget_of_40_per_cent() -> None:
    """Against a hard cut with the same mean length."""
    gain, off = verdicts(DONE)

    assert gain[0].startswith("budget 100 (40%)")
    assert gain[2].startswith("0.750")
    assert ("met", "0.050", "met") == (gain[3], off[2], off[3])


def test_every_way_of_limiting_is_asked_for_the_same_budget() -> None:
    """Four rows whose settings follow from the budget alone."""
    rows = rows_of(70)

    params = [row.body.get("strategy", {}).get("params") for row in rows.values()]
    assert [{"budget": 70}, {"budget": 70, "hard": False}, None, None] == params
    assert ({"thinking_token_budget": 70}, {}) == (rows["hard end"].body, rows["asked"].body)
    assert "Think for at most 70 tokens." == rows["asked"].words


def test_no_two_rows_share_what_was_measured() -> None:
    """The journal knows them by their names."""
    names = [row.name for budget in (70, 71) for row in rows_of(budget).values()]

    assert len(names) == len(set(names))


def test_the_plot_is_well_formed_and_shows_every_series() -> None:
    """One polyline per series, one mark per point, all inside the picture."""
    root = ET.fromstring(plot(DONE))  # noqa: S314 - our own text
    tag = "{http://www.w3.org/2000/svg}"
    marks = [(float(mark.attrib["cx"]), float(mark.attrib["cy"])) for mark in root.iter(f"{tag}circle")]

    assert 3 == len(list(root.iter(f"{tag}polyline"))) == len(marks)
    assert all(0 < x < float(root.attrib["width"]) and 0 < y < float(root.attrib["height"]) for x, y in marks)


def test_a_name_with_markup_stays_text() -> None:
    """Escaped."""
    assert "a &lt; b" in chart([Series("a < b", [(1, 2), (3, 4)])], "x", "y")


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.31, 0.34), (0, 317), (5, 5)])
def test_ticks_cover_the_range_with_equal_steps(low: float, high: float) -> None:
    """And there are a handful of them."""
    found = ticks(low, high)
    steps = {round(b - a, 8) for a, b in pairwise(found)}

    assert found[0] <= low
    assert found[-1] >= high
    assert 1 == len(steps)
    assert 2 <= len(found) <= 9


def test_nothing_to_draw_is_an_error() -> None:
    """Rather than an empty picture."""
    with pytest.raises(ValueError, match="nothing"):
        chart([Series("a", [])], "x", "y")
