"""What a card says of how a model came about."""

from __future__ import annotations

from thinkserve.train.card import stages, told

FIRST = {"tokens": 1200, "seconds": 120.0, "hardware": "a core", "tokens_per_s": 10, "loss": 0.5, "before": None}


def test_a_widened_model_says_what_it_began_as() -> None:
    """Whoever counts its tokens has to count those of the small one as well."""
    assert told(FIRST).startswith("1,200 tokens in 2 minutes on a core (10 tokens/s)")
    assert told(FIRST | {"half": "small"}).startswith("began as small at twice the width; 1,200 tokens")


def test_stages_are_told_first_to_last() -> None:
    """The last one carries those before it."""
    last = FIRST | {"tokens": 7, "before": FIRST}
    assert [1200, 7] == [stage["tokens"] for stage in stages(last)]
