"""Journal, tables, run folders: what makes a run resumable and its report readable."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bench.harness import Journal, Options, machine, run_folder, table

OPTIONS = Options(model="nowhere")


def test_the_journal_is_found_again(tmp_path: Path) -> None:
    """A second journal on the same file holds what the first one recorded, in the same order."""
    first = Journal(tmp_path / "run" / "journal.jsonl")
    first.put("a/2", {"wall_s": 1.5})
    first.put("a/1", [1, 2])
    second = Journal(tmp_path / "run" / "journal.jsonl")

    assert "a/2" in second
    assert "a/3" not in second
    assert second.below("a/") == [{"wall_s": 1.5}, [1, 2]]


def test_a_torn_last_line_costs_only_its_own_measurement(tmp_path: Path) -> None:
    """A run killed while writing loses the line it was writing, and nothing else."""
    path = tmp_path / "journal.jsonl"
    Journal(path).put("whole", 1)
    path.write_text(path.read_text() + '{"key": "torn", "val')

    found = Journal(path)

    assert found["whole"] == 1
    assert "torn" not in found


def test_recording_after_a_torn_line_is_not_lost(tmp_path: Path) -> None:
    """The next measurement starts a line of its own."""
    path = tmp_path / "journal.jsonl"
    path.write_text('{"key": "torn", "val')
    Journal(path).put("next", 2)

    assert Journal(path)["next"] == 2


def test_other_options_are_another_run(tmp_path: Path) -> None:
    """Figures measured with other options are never taken for this run's."""
    again, other = run_folder(OPTIONS, tmp_path), run_folder(replace(OPTIONS, seed=1), tmp_path)

    assert run_folder(OPTIONS, tmp_path) == again
    assert again != other


def test_other_weights_are_another_run(tmp_path: Path) -> None:
    """A model trained anew in the same place starts a new run."""
    options = replace(OPTIONS, model=str(tmp_path))
    before = run_folder(options, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"weights")

    assert before != run_folder(options, tmp_path)


def test_tables_are_aligned_markdown() -> None:
    """The first column to the left, figures to the right, every line equally wide."""
    expected = "| row   |  tok/s |\n| ----- | -----: |\n| one   |      7 |\n| three | 12,345 |"

    assert expected == table(("row", "tok/s"), [("one", "7"), ("three", "12,345")])


def test_a_table_with_a_missing_cell_is_an_error() -> None:
    """Cells never slide under another column's heading."""
    with pytest.raises((ValueError, IndexError)):
        table(("a", "b"), [("1",)])


def test_the_machine_line_says_what_it_ran_on() -> None:
    """Cores and memory are there, and no host name."""
    assert "cores" in machine()
    assert "GiB" in machine()


def test_a_quick_run_is_smaller_everywhere() -> None:
    """`--quick` keeps the shape of the run and shrinks its size."""
    quick = OPTIONS.quick()

    assert quick.problems < OPTIONS.problems
    assert quick.startups < OPTIONS.startups
    assert quick.chat_levels == OPTIONS.chat_levels
