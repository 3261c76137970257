"""`thinkserve vectors`: from pairs to a stored vector and its strength, and every mistake in one line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch
from xml.etree import ElementTree as ET

import pytest
import torch

from tests.steering.scripted_writer import ScriptedWriter
from thinkserve.server import cli
from thinkserve.server.model_dir import check_model
from thinkserve.server.settings import Settings
from thinkserve.server.vectors import VectorRegistry, shape_of
from thinkserve.steering.vector_file import VectorFile, serialize, view
from thinkserve.steering.writer import Written

EMBEDDED = Path(__file__).resolve().parents[2] / "models" / "arith-small"
PAIRS = [
    {"question": f"{n}+1", "concise": f"{n + 1}", "verbose": f"So {n}+1={n + 1}.", "answer": n + 1} for n in range(6)
]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Two random blocks of width 16."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path / "model"
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = Qwen3Config(
        vocab_size=640, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=512, eos_token_id=2, initializer_range=0.5,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(EMBEDDED / name, folder)
    return folder


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, PAIRS)))
    return file


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    """The exit status of `thinkserve vectors ...`, in this process, whose environment stays as it is."""
    monkeypatch.setattr(sys, "argv", ["thinkserve", "vectors", *map(str, arguments)])
    with patch.dict(os.environ, {"COLUMNS": "200"}), pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


@contextmanager
def scripted(settings: Settings) -> Iterator[ScriptedWriter]:
    """An engine on which every vector shortens, and none lengthens when it is subtracted."""
    assert settings.steering

    def write(prompt: list[int], scale: float) -> Written:
        thought = prompt[-1:] if scale > 0 else prompt[-3:]
        return Written([*thought, 2], thought, True)

    yield ScriptedWriter(write)


def stored(model: Path) -> VectorRegistry:
    return VectorRegistry(model / "vectors", shape_of(check_model(model)))


def test_a_vector_is_made_calibrated_shown_and_removed(
    model: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One whose sign is in doubt must be kept by force; the story of the vector grows with each step."""
    monkeypatch.setattr("thinkserve.server.vectors_writer.started", scripted)
    common: list[str | Path] = ["--model", model, "--pairs", pairs, "--max-tokens", "16"]
    refused = run(monkeypatch, "extract", "brief", "--layers", "all", "-n", "6", "--sign-questions", "2", *common)
    nothing = dict(stored(model).snapshot())
    made = run(
        monkeypatch, "extract", "brief", "--layers", "all", "-n", "6", "--sign-questions", "2", "--keep", *common
    )
    first = stored(model).snapshot()
    plot = tmp_path / "plot.svg"
    each: list[str | Path] = ["--each-layer", "--scales", "0.5,1", "-n", "2", "--svg", plot, "--save", "best"]
    calibrated = run(monkeypatch, "calibrate", "brief", *each, *common)
    best = stored(model).snapshot()["best"]
    capsys.readouterr()
    shown = run(monkeypatch, "show", "best", "--model", model)
    told = json.loads(capsys.readouterr().out)
    listed = run(monkeypatch, "list", "--model", model)
    table = capsys.readouterr().out
    removed = run(monkeypatch, "rm", "brief", "--model", model)

    assert [1, 0, 0, 0, 0, 0] == [refused, made, calibrated, shown, listed, removed]
    assert {} == nothing
    assert {"brief", "brief-mean"} == set(first)
    assert [0, 1] == list(first["brief"].layers)
    about = first["brief"].about
    assert ("asc", "last", 6, False) == (
        about["recipe"], about["position"], about["pairs"], about["sign_check"]["ok"],
    )  # fmt: skip
    assert shape_of(check_model(model)).fingerprint == first["brief"].model_fingerprint
    assert 1 == len(best.layers)
    assert {0.0, 0.5, 1.0} == {point["scale"] for point in told["calibration"]["points"]}
    assert 0 < told["calibration"]["gamma_star"] < 10
    assert (0.5, 0.5) == (told["calibration"]["scale"], told["calibration"]["tokens_ratio"])
    assert {"plus": 2, "zero": 4, "minus": 4} == told["sign_check"]["tokens"]
    assert ET.parse(plot).getroot().tag.endswith("svg")  # noqa: S314 - written by us
    assert all(name in table for name in ("best", "brief", "brief-mean"))
    assert {"best", "brief-mean"} == set(stored(model).snapshot())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["extract", "../x", "--tasks", "easy"], "name must match"),
        (["extract", "x"], "name either --pairs FILE or --tasks LEVEL"),
        (["extract", "x", "--tasks", "huge"], "easy, medium, hard"),
        (["extract", "x", "--pairs", "/nowhere"], "cannot read /nowhere"),
        (["extract", "x", "--tasks", "easy", "--layers", "a"], "--layers takes numbers"),
        (["extract", "x", "--tasks", "easy", "--layers", "1,9"], "no layer 9; the model's layers are 0 to 5"),
        (["extract", "x", "--recipe", "magic"], "Invalid value for '--recipe'"),
        (["extract", "x", "--tasks", "easy", "--model", "/nowhere"], "Model directory not found: /nowhere"),
        (["calibrate", "x", "--tasks", "easy"], "No steering vector 'x'."),
        (["calibrate", "breif", "--tasks", "easy"], "No steering vector 'breif'. Did you mean 'brief'?"),
        (["calibrate", "brief", "--tasks", "easy", "--layers", "3"], "no layer 3"),
        (["calibrate", "brief", "--tasks", "easy", "--scales", "0"], "scales lie above 0"),
        (["show", "x"], "No steering vector 'x'."),
        (["rm", "x"], "No steering vector 'x'."),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Status 2, before the engine is started."""
    shape = shape_of(check_model(EMBEDDED))
    numbers = view(array("f", [1.0] * shape.hidden).tobytes())
    VectorRegistry(tmp_path, shape).put("brief", serialize(VectorFile({1: numbers})))
    monkeypatch.setattr("thinkserve.server.vectors_writer.started", lambda _: pytest.fail("the engine was started"))

    status = run(monkeypatch, *arguments, "--vectors-dir", tmp_path)

    error = capsys.readouterr().err
    assert (2, 1) == (status, error.count("\n")), error
    assert words in error


def folder_of(tmp_path: Path, **about: dict[str, Any]) -> Path:
    """Vectors of the embedded model by name, of each of which something is said."""
    shape = shape_of(check_model(EMBEDDED))
    numbers = view(array("f", [1.0] * shape.hidden).tobytes())
    tmp_path.mkdir(exist_ok=True)
    for name, told in about.items():
        (tmp_path / f"{name}.safetensors").write_bytes(serialize(VectorFile({1: numbers}, told)))
    return tmp_path


def test_a_list_shows_what_is_usable_and_names_what_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The good ones on standard output, the bad ones in one line, status 2."""
    folder = folder_of(tmp_path, good={}, better={})
    (folder / "broken.safetensors").write_bytes(b"no vector")
    (folder / "Loud.safetensors").write_bytes((folder / "good.safetensors").read_bytes())

    status = run(monkeypatch, "list", "--vectors-dir", folder)

    out, error = capsys.readouterr()
    assert (2, 1) == (status, error.count("\n")), error
    assert "thinkserve: Not steering vectors for this model: Loud.safetensors: a vector's name must match" in error
    assert "; broken.safetensors: not a safetensors file" in error
    assert ["better", "good"] == [line.split()[0] for line in out.splitlines()[1:]]


def test_a_vector_is_removed_whatever_else_lies_in_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the very file that cannot be used, and the description beside it."""
    folder = folder_of(tmp_path, good={}, **{"other.v2": {}})
    (folder / "broken.safetensors").write_bytes(b"no vector")
    for name in ("good", "broken", "other.v2"):
        (folder / f"{name}.json").write_text("{}")

    statuses = [run(monkeypatch, "rm", name, "--vectors-dir", folder) for name in ("good", "broken", "broken")]

    assert [0, 0, 2] == statuses
    assert {"other.v2.safetensors", "other.v2.json"} == {file.name for file in folder.iterdir()}


def test_removing_names_no_other_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A name is no path; a misspelt one is told the nearest."""
    folder = folder_of(tmp_path / "v", brief={})
    (tmp_path / "x.safetensors").write_bytes(b"")

    statuses = [run(monkeypatch, "rm", name, "--vectors-dir", folder) for name in ("../x", "breif")]

    first, second = capsys.readouterr().err.splitlines()
    assert [2, 2] == statuses
    assert "name must match" in first
    assert "Did you mean 'brief'?" in second
    assert (tmp_path / "x.safetensors").exists()


@pytest.mark.parametrize(
    "about",
    [
        {"calibration": {"scale": "strong", "tokens_ratio": None}},
        {"calibration": ["scale"]},
        {"calibration": None},
        {"calibration": {"scale": 2**64 - 1, "tokens_ratio": True}},
        {"calibration": {"scale": {"a": 1}}},
        {"recipe": "[/b] [bold"},
        {"recipe": {"a": ["b"]}},
        {"recipe": "\x1b[2J\n\n" + "x" * 5000},
    ],
)
def test_what_is_said_of_a_vector_never_breaks_the_table(
    about: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Others have written it: any JSON, text that looks like markup, control characters."""
    status = run(monkeypatch, "list", "--vectors-dir", folder_of(tmp_path, odd=about))

    out, error = capsys.readouterr()
    assert (0, "") == (status, error)
    assert ["vector", "odd"] == [line.split()[0] for line in out.splitlines()]
    assert "\x1b" not in out


def test_looking_at_vectors_imports_nothing_slow(tmp_path: Path) -> None:
    """A list is there at once."""
    code = (
        "import sys; from thinkserve.server import cli; sys.argv = ['thinkserve', 'vectors', 'list']\n"
        "try: cli.main()\nexcept SystemExit: print(sorted({'torch', 'transformers', 'vllm'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, "PYTHONSAFEPATH": "1"}, timeout=100,
    )  # fmt: skip

    assert done.stdout.endswith("[]\n")
