"""The search bench: what each method is told of a budget, and what ended its searches."""

from __future__ import annotations

import pytest

from bench.inprocess import Measured, Row, Sample
from bench.search import A_STARS, AHEAD, BUDGETS, METHODS, cells, row_of
from thinkserve.strategies.engine import Task
from thinkserve.strategies.registry import get
from thinkserve.strategies.testing import ScriptedEngine
from thinkserve.strategies.tree_budget import TreeOptions, limits


@pytest.mark.parametrize("mean", [80.0, 333.3, 1024.0, 2048.0])
@pytest.mark.parametrize("chains", [1, *BUDGETS])
@pytest.mark.parametrize("method", sorted(A_STARS))
def test_the_tokens_of_its_budget_are_what_limits_a_star(method: str, chains: int, mean: float) -> None:
    """Neither does the width of the search give it less, nor can expansions be used up before the tokens are."""
    told = row_of(method, chains, mean, 2048).body["strategy"]
    options = get(told["name"]).options.model_validate(told["params"])
    assert isinstance(options, TreeOptions)
    engine = ScriptedEngine([])
    task = Task(engine.encode("q"), 2048, max_total_tokens=told["max_total_tokens"])

    assert round(chains * mean) == limits(task, engine, options).tokens
    assert 4096 == told["params"]["max_expansions"]


def test_a_larger_budget_is_another_search() -> None:
    """A search that ends with its first solution would spend the same at any: it is told to look wider."""
    widths = [row_of("a-star", chains, 300.0, 2048).body["strategy"]["params"]["k"] for chains in BUDGETS]

    assert [2, 3, 4, 6] == widths


def test_both_a_stars_differ_in_nothing_but_what_is_said() -> None:
    """So that the table shows what that does."""
    plain, ahead = (row_of(method, 8, 300.0, 2048).body["strategy"] for method in A_STARS)

    assert ahead == plain | {"params": plain["params"] | AHEAD}


@pytest.mark.parametrize("method", sorted(set(METHODS) - set(A_STARS)))
def test_a_method_that_fixes_its_solutions_gets_their_number(method: str) -> None:
    """And nothing else; it is a number that the method takes."""
    row = row_of(method, 8, 300.0, 2048)

    assert (f"{method}@8", {METHODS[method]: 8}) == (row.name, row.body["strategy"]["params"])
    assert "max_total_tokens" not in row.body["strategy"]
    get(method).options.model_validate(row.body["strategy"]["params"])


def test_the_table_tells_what_ended_the_searches() -> None:
    """The share of each cause, so that a budget nobody came near is seen to be none."""
    samples = [
        Sample(True, "7", 5, 9, 0.5, {"stopped_by": why}) for why in ("all_done", "budget", "all_done", "length")
    ]

    assert "all_done 0.50, budget 0.25, length 0.25" == cells(Measured(Row("a-star@8"), samples))[-1]
