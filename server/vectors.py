"""The steering vectors of a server, by name: read from one folder at start, put and deleted by the operator.

A request names a vector and never a file. What is held never changes: a replacement is a new object under the same
name, and whoever took a snapshot goes on with what was there. The id is the content, so a worker that has it loaded
need not ask which version it is.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from types import MappingProxyType
from typing import Any

from thinkserve.server.model_dir import ModelDir, StartError
from thinkserve.server.settings import Settings
from thinkserve.steering.fingerprint import fingerprint
from thinkserve.steering.vector_file import CONVENTION, MAX_BYTES, BadVector, VectorFile, parse, serialize

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
MAX_VECTORS = 256


@dataclass(frozen=True, slots=True)
class Shape:
    """What a vector must fit: width of the residual stream, number of blocks, and which model it is."""

    hidden: int
    layers: int
    fingerprint: str = ""


@dataclass(frozen=True, slots=True)
class SteeringVector:
    """One version of one vector.

    `layers` maps a block (counted from 0, its output is steered) to a read-only view of [hidden] float32; `norms` are
    Euclidean. `id` is the content's SHA-256. `about` is what its maker says of it, JSON; the rest is taken from there.
    """

    name: str
    version: int
    id: str
    hidden: int
    layers: Mapping[int, memoryview[float]]
    norms: Mapping[int, float]
    about: Mapping[str, Any]

    @property
    def described(self) -> dict[str, Any]:
        """For people, as JSON: what its maker says, and what was measured whatever that says."""
        return {**self.about, "id": self.id, "norms": {str(layer): norm for layer, norm in self.norms.items()}}

    @property
    def recipe(self) -> str:
        """How it was made."""
        return str(self.about.get("recipe", "unknown"))

    @property
    def convention(self) -> str:
        """What a layer number means."""
        return str(self.about.get("convention", CONVENTION))

    @property
    def model_fingerprint(self) -> str:
        """The model that it was made for; empty when that is not known."""
        return str(self.about.get("model_fingerprint", ""))


Vectors = Mapping[str, SteeringVector]


class VectorRegistry:
    """Vectors by name, each checked against the model; `put` and `delete` are atomic, on disk and in memory.

    Methods block on the disk and may be called from any thread. Raises StartError when the folder holds a file that is
    no vector for this model.
    """

    def __init__(self, folder: Path, shape: Shape) -> None:
        self.shape = shape
        self._folder = folder
        self._lock = Lock()
        self._vectors: Vectors = MappingProxyType(self._read())

    def snapshot(self) -> Vectors:
        """All vectors as they are now; never changed afterwards."""
        return self._vectors

    def put(self, name: str, raw: bytes) -> SteeringVector:
        """Add a vector or replace it by a new version; the same content is the same version.

        Raises BadVector for a name or a file that cannot be used, OSError when it cannot be written.
        """
        check_name(name)
        file = parse(raw)
        with self._lock:
            old = self._vectors.get(name)
            if old is None and len(self._vectors) >= MAX_VECTORS:
                raise BadVector(f"there are {MAX_VECTORS} vectors already; delete one first")
            if old is not None and old.id == file.id and without_version(old.about) == without_version(file.about):
                return old
            version = old.version + 1 if old else 1
            vector = checked(name, VectorFile(file.layers, {**file.about, "version": version}), self.shape)
            self._write(vector)
            self._vectors = MappingProxyType({**self._vectors, name: vector})
        return vector

    def delete(self, name: str) -> bool:
        """Forget a vector, whether there was one. Requests at work keep theirs. Raises OSError."""
        with self._lock:
            if name not in self._vectors:
                return False
            remove_files(self._folder, name)
            self._vectors = MappingProxyType({other: v for other, v in self._vectors.items() if other != name})
        return True

    def _read(self) -> dict[str, SteeringVector]:
        files = vector_files(self._folder)
        if len(files) > MAX_VECTORS:
            raise StartError(f"{self._folder} holds {len(files)} steering vectors; at most {MAX_VECTORS} are served")
        return {file.stem: self._read_one(file) for file in files}

    def _read_one(self, file: Path) -> SteeringVector:
        try:
            return read_vector(file, self.shape)
        except (BadVector, OSError) as error:
            raise StartError(f"Not a steering vector for this model: {file}: {error}") from None

    def _write(self, vector: SteeringVector) -> None:
        raw = serialize(VectorFile(vector.layers, vector.about))
        self._folder.mkdir(parents=True, exist_ok=True)
        tensors, metadata = both_files(self._folder, vector.name)
        # The copy for people goes first: the tensors' file is complete by itself, and its rename is what counts.
        replace(metadata, (json.dumps(vector.described, indent=1, sort_keys=True) + "\n").encode())
        replace(tensors, raw)


def check_name(name: str) -> None:
    """BadVector unless `name` is a slug that names no other place than a file in the registry's folder."""
    if not NAME.fullmatch(name):
        raise BadVector(f"a vector's name must match {NAME.pattern}")


def checked(name: str, file: VectorFile, shape: Shape) -> SteeringVector:
    """The vector in a file. Raises BadVector when it does not fit the model."""
    if file.hidden != shape.hidden:
        raise BadVector(f"the vector has {file.hidden} numbers per layer; the model's hidden size is {shape.hidden}")
    if (last := max(file.layers)) >= shape.layers:
        raise BadVector(f"the vector is for layer {last}; the model's layers are 0 to {shape.layers - 1}")
    version = file.about.get("version")
    version = version if isinstance(version, int) and version > 0 else 1
    layers, norms = MappingProxyType(dict(file.layers)), MappingProxyType(file.norms)
    return SteeringVector(name, version, file.id, file.hidden, layers, norms, MappingProxyType(dict(file.about)))


def vector_files(folder: Path) -> list[Path]:
    """The files that should hold vectors, by name; none where there is no folder."""
    return sorted(folder.glob("*.safetensors")) if folder.is_dir() else []


def both_files(folder: Path, name: str) -> tuple[Path, Path]:
    """Where a vector's tensors lie, and what is said of it for people."""
    return folder / f"{name}.safetensors", folder / f"{name}.json"


def remove_files(folder: Path, name: str) -> None:
    """Take a vector off the disk, be its file usable or not. Raises OSError."""
    for file in both_files(folder, name):
        file.unlink(missing_ok=True)


def read_vector(file: Path, shape: Shape) -> SteeringVector:
    """The vector in a file of the operator's, by the file's name. Raises BadVector, OSError."""
    check_name(file.stem)
    with file.open("rb") as stream:
        return checked(file.stem, parse(stream.read(MAX_BYTES + 1)), shape)


def replace(file: Path, content: bytes) -> None:
    """Write a whole file or nothing: readers see the old one or the new one. Raises OSError."""
    descriptor, name = tempfile.mkstemp(dir=file.parent, prefix=".new-")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(descriptor)
            os.fchmod(descriptor, 0o644)
        Path(name).replace(file)
    except BaseException:
        with suppress(OSError):
            Path(name).unlink()
        raise


def without_version(about: Mapping[str, Any]) -> dict[str, Any]:
    """What was said about a vector, less what the registry adds."""
    return {key: value for key, value in about.items() if key != "version"}


def shape_of(model: ModelDir) -> Shape:
    """What vectors must fit, from the model's configuration. Raises StartError when it does not say."""
    config = json.loads((model.path / "config.json").read_text(encoding="utf-8"))
    text = config.get("text_config", config)
    try:
        return Shape(int(text["hidden_size"]), int(text["num_hidden_layers"]), fingerprint(model.path))
    except (KeyError, TypeError, ValueError):
        raise StartError(f"No hidden_size and num_hidden_layers in {model.path / 'config.json'}") from None


def vectors_folder(settings: Settings, model: ModelDir) -> Path:
    """Where a model's vectors lie: the configured folder, else `vectors` beside its weights."""
    return settings.vectors_dir or model.path / "vectors"


def open_registry(settings: Settings, model: ModelDir) -> VectorRegistry | None:
    """The registry of a served model; None when steering is switched off. Raises StartError."""
    return VectorRegistry(vectors_folder(settings, model), shape_of(model)) if settings.steering else None
