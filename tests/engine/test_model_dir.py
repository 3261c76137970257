"""A model directory that cannot be served is refused in one line, before anything slow is imported."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from thinkserve.server.model_dir import StartError, check_model, find_model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A whole, tiny model directory."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": ["Qwen3ForCausalLM"]}))
    (folder / "tokenizer.json").write_text("{}")
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    return folder


def test_a_whole_directory_is_found_by_its_path(model: Path) -> None:
    """With its name, its architecture and the size of its weights."""
    found = find_model(str(model))
    assert (found.name, found.architecture) == ("tiny", "Qwen3ForCausalLM")
    assert found.weight_bytes == (model / "model.safetensors").stat().st_size
    assert found.small


def test_the_embedded_model_is_whole() -> None:
    """No model named: arith-small, in the checkout or in the wheel."""
    assert find_model(None).name == "arith-small"


def test_a_model_of_the_hub_keeps_its_name(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients ask for the last part of what the operator wrote, not for the commit that its folder is called after."""
    commit, repository = "0123456789abcdef0123456789abcdef01234567", tmp_path / "hub" / "models--acme--tiny-think"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots").mkdir()
    model.rename(repository / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    found = find_model("acme/tiny-think")

    assert (found.name, found.path.name) == ("tiny-think", commit)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda m: (m / "config.json").unlink(), "No config.json"),
        (lambda m: (m / "config.json").write_text("{"), "Cannot read"),
        (lambda m: (m / "config.json").write_text("[]"), "not a JSON object"),
        (lambda m: (m / "config.json").write_text("{}"), "no architectures"),
        (lambda m: (m / "tokenizer.json").unlink(), "No tokenizer"),
        (lambda m: (m / "model.safetensors").unlink(), "No safetensors"),
        (lambda m: cut(m / "model.safetensors"), "incomplete"),
        (lambda m: (m / "model.safetensors").write_bytes(b"version https://git-lfs"), "damaged"),
        (lambda m: (m / "model.safetensors").write_bytes(b""), "damaged"),
        (lambda m: (m / "model.safetensors.index.json").write_text('{"weight_map": {"w": "gone"}}'), "Cannot read"),
    ],
)
def test_damage_is_told_in_one_line(model: Path, damage: Callable[[Path], object], message: str) -> None:
    """Each with words that say what to do."""
    damage(model)
    with pytest.raises(StartError, match=message) as caught:
        check_model(model)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["/no/such/place", "no-such-folder", "./no/model"])
def test_a_path_that_is_not_there_is_not_looked_up_elsewhere(name: str) -> None:
    """Only `owner/name` may be a Hugging Face repository."""
    with pytest.raises(StartError, match="not found"):
        find_model(name)


def test_the_check_imports_neither_vllm_nor_torch() -> None:
    """It must answer at once."""
    code = "import sys, thinkserve.server.vllm_engine; print({'vllm', 'torch', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
