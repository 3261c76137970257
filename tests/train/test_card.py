"""What a card says of how a model came about."""

from __future__ import annotations

import json
from pathlib import Path

from thinkserve.train.card import stages, told, write_card
from thinkserve.train.model import SHAPES

LARGE = Path(__file__).resolve().parents[2] / "models" / "arith-large"

FIRST = {"tokens": 1200, "seconds": 120.0, "hardware": "a core", "tokens_per_s": 10, "loss": 0.5, "before": None}


def test_a_widened_model_says_what_it_began_as() -> None:
    """Whoever counts its tokens has to count those of the small one as well."""
    assert told(FIRST).startswith("1,200 tokens in 2 minutes on a core (10 tokens/s)")
    assert told(FIRST | {"half": "small"}).startswith("began as small at twice the width; 1,200 tokens")


def test_stages_are_told_first_to_last() -> None:
    """The last one carries those before it."""
    last = FIRST | {"tokens": 7, "before": FIRST}
    assert [1200, 7] == [stage["tokens"] for stage in stages(last)]


def test_a_card_written_anew_says_the_same(tmp_path: Path) -> None:
    """From its evaluation.json and what lies beside it, the steering vector included."""
    report = json.loads((LARGE / "evaluation.json").read_text())
    folder = tmp_path / LARGE.name
    folder.mkdir()
    for beside in ("vectors", "budget"):
        (folder / beside).symlink_to(LARGE / beside)

    write_card(folder, SHAPES["large"], report["training"], report)

    assert (folder / "README.md").read_text() == (LARGE / "README.md").read_text()
    assert "`brief`: recipe asc, position prompt, layers 4, 5" in (folder / "README.md").read_text()
