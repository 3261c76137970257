"""The registry: vectors by name, checked against the model, replaced whole or not at all."""

from __future__ import annotations

import json
import math
from array import array
from pathlib import Path
from typing import Any

import pytest

from thinkserve.server.model_dir import StartError, check_model
from thinkserve.server.settings import Settings
from thinkserve.server.vectors import MAX_VECTORS, Shape, VectorRegistry, open_registry, shape_of
from thinkserve.steering.vector_file import BadVector, VectorFile, serialize, view

SHAPE = Shape(hidden=3, layers=6, fingerprint="f" * 32)
MODEL = Path(__file__).resolve().parents[2] / "models" / "arith-small"


def vector(first: float = 1.0, layers: tuple[int, ...] = (4,), hidden: int = 3, **about: Any) -> bytes:
    numbers = view(array("f", [first, *[2.0] * (hidden - 1)]).tobytes())
    return serialize(VectorFile(dict.fromkeys(layers, numbers), about))


def files(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def test_what_was_put_is_there_after_a_restart(tmp_path: Path) -> None:
    """With its version, its id and what was said about it."""
    registry = VectorRegistry(tmp_path / "new", SHAPE)
    registry.put("brief", vector(recipe="asc", model_fingerprint="abc", n=50))
    put = registry.put("brief", vector(2.0, recipe="asc", model_fingerprint="abc", n=50))

    again = VectorRegistry(tmp_path / "new", SHAPE).snapshot()

    assert {"brief": put} == dict(again)
    assert (2, "asc", "abc", 3) == (put.version, put.recipe, put.model_fingerprint, put.hidden)
    assert {4: pytest.approx(math.sqrt(12))} == dict(put.norms)
    assert {"brief.safetensors", "brief.json"} == files(tmp_path / "new")
    assert put.id == json.loads((tmp_path / "new/brief.json").read_text())["id"]


def test_a_snapshot_never_changes(tmp_path: Path) -> None:
    """Whoever works with a version goes on with it, whatever is put or deleted meanwhile."""
    registry = VectorRegistry(tmp_path, SHAPE)
    registry.put("brief", vector(1.0))
    before = registry.snapshot()

    registry.put("brief", vector(9.0))
    replaced = registry.snapshot()
    registry.delete("brief")

    assert [1.0, 9.0] == [each["brief"].layers[4][0] for each in (before, replaced)]
    assert {} == registry.snapshot()
    assert set() == files(tmp_path)
    with pytest.raises(TypeError):
        before["brief"].layers[4][0] = 5.0


def test_the_same_content_is_the_same_version(tmp_path: Path) -> None:
    """Putting twice is harmless; deleting what is not there too."""
    registry = VectorRegistry(tmp_path, SHAPE)

    versions = [registry.put("a", vector(value, n=n)).version for value, n in ((1, 1), (1, 1), (2, 1), (2, 2), (1, 2))]

    assert [1, 1, 2, 3, 4] == versions
    assert [True, False] == [registry.delete("a"), registry.delete("a")]


@pytest.mark.parametrize(
    "name",
    [
        "",
        "../../etc/passwd",
        "/abs",
        "a/b",
        "a%2fb/..",
        ".hidden",
        "a\0b",
        "x" * 65,
        "CON",
        "Brief",
        "naïve",
        "a b",
        "a\n",
    ],
)
def test_a_name_is_never_a_path(name: str, tmp_path: Path) -> None:
    """Only slugs; nothing is written for any other."""
    registry = VectorRegistry(tmp_path / "v", SHAPE)

    with pytest.raises(BadVector, match="name"):
        registry.put(name, vector())

    assert [] == list(tmp_path.iterdir())
    assert not registry.delete(name)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (vector(hidden=4), "hidden size is 3"),
        (vector(layers=(2, 6)), "layers are 0 to 5"),
        (b"no vector", "safetensors"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(content: bytes, reason: str, tmp_path: Path) -> None:
    """When it is put, with nothing changed; and at start, in one line that names the file."""
    registry = VectorRegistry(tmp_path, SHAPE)

    with pytest.raises(BadVector, match=reason):
        registry.put("a", content)
    (tmp_path / "a.safetensors").write_bytes(content)

    assert {} == registry.snapshot()
    with pytest.raises(StartError, match=rf"a\.safetensors.*{reason}"):
        VectorRegistry(tmp_path, SHAPE)


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    """Putting over a link leaves the file outside alone."""
    outside, folder = tmp_path / "outside", tmp_path / "v"
    outside.write_bytes(vector(1.0))
    folder.mkdir()
    (folder / "a.safetensors").symlink_to(outside)
    registry = VectorRegistry(folder, SHAPE)

    registry.put("a", vector(2.0))

    assert vector(1.0) == outside.read_bytes()
    assert not (folder / "a.safetensors").is_symlink()


def test_a_disk_that_fails_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No half file, no temporary one, the old version everywhere."""
    registry = VectorRegistry(tmp_path, SHAPE)
    old = registry.put("a", vector(1.0))
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="space"):
        registry.put("a", vector(2.0))

    assert {"a": old} == dict(registry.snapshot())
    assert before == {file.name: file.read_bytes() for file in tmp_path.iterdir()}


def test_there_is_room_for_so_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One more is refused; replacing is not."""
    monkeypatch.setattr("thinkserve.server.vectors.MAX_VECTORS", 2)
    registry = VectorRegistry(tmp_path, SHAPE)
    for name in ("a", "b"):
        registry.put(name, vector())

    with pytest.raises(BadVector, match="2 vectors"):
        registry.put("c", vector())

    assert registry.put("b", vector(5.0)).version == 2
    assert MAX_VECTORS > 2


def test_the_shape_comes_from_the_models_configuration(tmp_path: Path) -> None:
    """Also where the language model is a part; a configuration without it is told in one line."""
    shape, model = shape_of(check_model(MODEL)), tmp_path / "m"
    config = json.loads((MODEL / "config.json").read_text())
    model.mkdir()
    for name in ("tokenizer.json", "model.safetensors"):
        (model / name).symlink_to(MODEL / name)
    (model / "config.json").write_text(json.dumps({"architectures": ["X"], "text_config": config}))
    part = shape_of(check_model(model))
    (model / "config.json").write_text('{"architectures": ["X"]}')

    assert (config["hidden_size"], config["num_hidden_layers"]) == (shape.hidden, shape.layers)
    assert (shape.hidden, shape.layers) == (part.hidden, part.layers)
    assert shape.fingerprint != part.fingerprint
    with pytest.raises(StartError, match="hidden_size"):
        shape_of(check_model(model))


def test_the_folder_is_the_configured_one_or_the_models(tmp_path: Path) -> None:
    """And there is no registry where steering is off."""
    model = check_model(MODEL)
    hidden = shape_of(model).hidden
    VectorRegistry(tmp_path, shape_of(model)).put("here", vector(hidden=hidden, layers=(0,)))

    configured = open_registry(Settings(vectors_dir=tmp_path), model)

    assert configured is not None
    assert {"here"} == set(configured.snapshot())
    assert open_registry(Settings(steering=False), model) is None
