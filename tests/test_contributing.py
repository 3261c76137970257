"""The example in CONTRIBUTING.md is not prose: it is a strategy that passes the contract as printed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The code block, as a file of the name that the text gives it."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    (code,) = re.findall(r"<!-- example:begin -->\n```python\n(.*?)```\n<!-- example:end -->", text, re.DOTALL)
    folder = tmp_path_factory.mktemp("example")
    (folder / "first_of_k.py").write_text(code)
    return folder


def run(example: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(example), "MYPYPATH": "typings", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False, capture_output=True, text=True)


@pytest.mark.slow
def test_the_example_passes_the_contract_by_being_imported(example: Path) -> None:
    """Every property of every strategy, found by the contract tests themselves."""
    done = run(
        example, "pytest", "-p", "first_of_k", "-p", "no:cacheprovider", "-q", "-k", "first-of-k",
        "tests/strategies/test_contract.py",
    )  # fmt: skip
    passed = re.search(r"(\d+) passed", done.stdout)

    assert 0 == done.returncode, done.stdout
    assert passed
    assert int(passed[1]) >= 10


def test_the_example_is_clean(example: Path) -> None:
    """By the linter's rules for strategies."""
    done = run(example, "ruff", "check", "--quiet", "--ignore", "INP001", str(example / "first_of_k.py"))

    assert ("", 0) == (done.stdout, done.returncode)
