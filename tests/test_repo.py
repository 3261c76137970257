"""The repository as its readers meet it: commands that exist, links that lead somewhere, nothing of one machine."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MADE = {".git", ".venv", ".cache", ".mypy_cache", ".ruff_cache", ".pytest_cache", ".hypothesis", "__pycache__", "runs"}
TEXT = {"", ".md", ".py", ".toml", ".txt", ".in", ".exclude", ".yml", ".yaml", ".json", ".jinja", ".cfg", ".sh"}
# A home or work directory in an absolute path, a package index, an address with a password in it.
MACHINE = re.compile(
    r"(?<![\w.~-])/(?:home|Users|root|work|mnt|tmp)/\w|py(?:pi|thonhosted)\.org|download\.pytorch|\w://[^/\s\"'<]+:[^/\s\"']+@"
)


def texts() -> list[Path]:
    """Every text file that a commit holds."""
    files: list[Path] = []
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [name for name in folders if name not in MADE and not name.endswith(".egg-info")]
        files += [Path(folder) / name for name in names if Path(name).suffix in TEXT]
    return sorted(file for file in files if file.name != "tokenizer.json")


def targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_no_text_tells_where_it_was_written() -> None:
    """No path of one machine and no address of a package index: whoever installs has their own."""
    found = [
        f"{file.relative_to(ROOT)}: {match[0]}"
        for file in texts()
        if file != Path(__file__)
        for match in MACHINE.finditer(file.read_text(encoding="utf-8"))
    ]

    assert [] == found


@pytest.mark.parametrize("text", ["/home/me/x", "see /work/main", "https://pypi.org/simple", "http://u:p@host/"])
def test_the_rule_above_can_fail(text: str) -> None:
    """Each kind is recognised."""
    assert MACHINE.search(text)


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "OPERATING.md"])
def test_every_make_command_in_the_documentation_exists(name: str) -> None:
    """A reader who copies a command gets it."""
    command = r"(?:^|`|[A-Z]+=\S+ )make ([a-z-]+)\b"
    mentioned = set(re.findall(command, (ROOT / name).read_text(), re.MULTILINE))

    assert set() == mentioned - targets()


def test_make_alone_lists_every_command() -> None:
    """`make` explains itself."""
    listed = subprocess.run(["make", "-s"], cwd=ROOT, check=True, capture_output=True, text=True).stdout

    assert targets() - {"run-venv", "dev-venv"} == set(re.findall(r"make ([a-z-]+)", listed))


def test_ci_runs_what_people_run() -> None:
    """`.ci/run` is `make test`, and the workflow is `.ci/run`."""
    commands = [line for line in (ROOT / ".ci/run").read_text().splitlines() if line and not line.startswith("#")]

    assert "exec make test </dev/null" == commands[-1]
    assert re.findall(r"- run: (.*)", (ROOT / ".github/workflows/ci.yml").read_text()) == [".ci/run"]


def test_actions_of_the_workflow_are_pinned() -> None:
    """By commit: a tag can be moved."""
    uses = re.findall(r"uses: (\S+)", (ROOT / ".github/workflows/ci.yml").read_text())

    assert uses
    assert [] == [use for use in uses if not re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", use)]


@pytest.mark.parametrize("name", [".ci/run", "scripts/check", "scripts/gen", "scripts/lock", "scripts/setup"])
def test_scripts_can_be_started(name: str) -> None:
    """Executable, with an interpreter line, and bash stops at the first error."""
    text = (ROOT / name).read_text()

    assert os.access(ROOT / name, os.X_OK)
    assert text.startswith("#!/usr/bin/env ")
    assert "bash" not in text.splitlines()[0] or "set -euo pipefail" in text


def test_type_checkers_find_the_packages_by_links() -> None:
    """typings/thinkserve/<package> leads to the folder of that name."""
    links = {link.name: link.resolve() for link in (ROOT / "typings/thinkserve").iterdir()}

    assert {name: ROOT / name for name in ("guidance", "kernels", "server", "steering", "strategies", "train")} == links


def test_the_changelog_keeps_its_form() -> None:
    """Keep a Changelog: versions newest first, with a date, sections of the agreed names."""
    text = (ROOT / "CHANGELOG.md").read_text()
    versions = re.findall(r"^## \[(.+?)\](?: - (\d{4}-\d\d-\d\d))?$", text, re.MULTILINE)
    sections = set(re.findall(r"^### (.+)$", text, re.MULTILINE))
    numbers = [tuple(map(int, version.split("."))) for version, _ in versions[1:]]

    assert ("Unreleased", "") == versions[0]
    assert numbers == sorted(numbers, reverse=True)
    assert sections <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_generated_parts_are_up_to_date() -> None:
    """openapi.yaml and README's table are what the code says; `make generate` writes them."""
    done = subprocess.run([ROOT / "scripts/gen", "--check"], cwd=ROOT, check=False, capture_output=True, text=True)

    assert (0, "") == (done.returncode, done.stderr)
