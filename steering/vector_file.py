"""The file of a steering vector: safetensors with one float32 tensor `layer.<n>` of shape [hidden] per steered block.

n counts blocks from 0 and the vector is added to the block's OUTPUT. What is known of the vector (recipe, model, sign
check, calibration) is JSON in the file's own metadata, so that a vector is one file and replacing it is one rename.
Files are read without torch, numpy or pickle, and nothing in them is believed: sizes are checked before they are used.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

MAX_BYTES = 64 * 2**20
MAX_HEADER_BYTES = 64 * 1024
MAX_HIDDEN = 2**16
MAX_DEPTH = 64  # of what is said about a vector
# Beyond these the vector does nothing, or every state that it is added to overflows in 16 bits.
NORMS = (1e-6, 1e6)
CONVENTION = "output of block n, counted from 0; raw vector, added as scale * vector"
ABOUT = "thinkserve.steering"
_LAYER = re.compile(r"layer\.(0|[1-9][0-9]{0,3})")


class BadVector(ValueError):
    """A file that is no usable steering vector; the message is one sentence for whoever sent it."""


@dataclass(frozen=True, slots=True)
class VectorFile:
    """`layers` maps a block to its vector, a read-only view of [hidden] float32; `about` is JSON."""

    layers: Mapping[int, memoryview[float]]
    about: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def hidden(self) -> int:
        """Width of the residual stream that the vector fits."""
        return len(next(iter(self.layers.values())))

    @property
    def norms(self) -> dict[int, float]:
        """Euclidean norm per layer: a scale means nothing without it."""
        return {layer: norm(vector) for layer, vector in self.layers.items()}

    @property
    def id(self) -> str:
        """SHA-256, in hex, of the layer numbers (4 bytes each, little-endian) and the vectors' bytes."""
        digest = sha256()
        for layer in sorted(self.layers):
            digest.update(layer.to_bytes(4, "little") + self.layers[layer].tobytes())
        return digest.hexdigest()


def norm(vector: memoryview[float]) -> float:
    """Euclidean norm."""
    return math.sqrt(math.fsum(value * value for value in vector))


def view(raw: bytes) -> memoryview[float]:
    """Little-endian float32 bytes as numbers."""
    return memoryview(raw).cast("f")


def parse(raw: bytes) -> VectorFile:
    """The vector in `raw`. Raises BadVector for anything but what this module writes or could have written."""
    if len(raw) > MAX_BYTES:
        raise BadVector(f"a steering vector's file has at most {MAX_BYTES} bytes")
    size = int.from_bytes(raw[:8], "little")
    if len(raw) < 8 or not 2 <= size <= min(MAX_HEADER_BYTES, len(raw) - 8):
        raise BadVector("not a safetensors file, or one with a header that is cut off or too large")
    header = _header(raw[8 : 8 + size])
    metadata = header.pop("__metadata__", {})
    layers = _layers(header, raw[8 + size :])
    return VectorFile(dict(sorted(layers.items())), _about(metadata))


def serialize(file: VectorFile) -> bytes:
    """The bytes of a file, the same for the same content. Raises BadVector when `about` is too large."""
    header: dict[str, Any] = {"__metadata__": {ABOUT: json.dumps(dict(file.about), sort_keys=True, allow_nan=False)}}
    width = 4 * file.hidden
    for index, layer in enumerate(sorted(file.layers)):
        offsets = [index * width, (index + 1) * width]
        header[f"layer.{layer}"] = {"dtype": "F32", "shape": [file.hidden], "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise BadVector("what is said about the vector does not fit into the file's header")
    return len(text).to_bytes(8, "little") + text + b"".join(file.layers[n].tobytes() for n in sorted(file.layers))


def _header(raw: bytes) -> dict[str, Any]:
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except BadVector:
        raise
    except (ValueError, RecursionError):
        # Not only what is no JSON and no UTF-8: Python reads no integer of more than 4300 digits.
        raise BadVector("not a safetensors file: its header is not JSON") from None
    if not isinstance(header, dict):
        raise BadVector("not a safetensors file: its header is not an object")
    return header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise BadVector("a name occurs twice in the header")
    return found


def _layers(header: dict[str, Any], data: bytes) -> dict[int, memoryview[float]]:
    if not header:
        raise BadVector("there is no tensor in the file")
    layers: dict[int, memoryview[float]] = {}
    spans: list[tuple[int, int]] = []
    for name, entry in header.items():
        match = _LAYER.fullmatch(name)
        if match is None:
            raise BadVector("tensors must be named layer.<n>, n the block whose output is steered")
        begin, end = _span(name, entry, len(data))
        spans.append((begin, end))
        layers[int(match[1])] = _checked(name, view(data[begin:end]))
    spans.sort()
    if [begin for begin, _ in spans] != [0, *(end for _, end in spans[:-1])] or spans[-1][1] != len(data):
        raise BadVector("the tensors overlap or leave bytes of the file unused")
    if len({len(vector) for vector in layers.values()}) > 1:
        raise BadVector("the tensors differ in size")
    return layers


def _span(name: str, entry: object, size: int) -> tuple[int, int]:
    match entry:
        case {"dtype": "F32", "shape": [int(hidden)], "data_offsets": [int(begin), int(end)]}:
            if 0 < hidden <= MAX_HIDDEN and 0 <= begin and begin + 4 * hidden == end <= size:
                return begin, end
            raise BadVector(f"{name} is cut off, empty or too large")
    raise BadVector(f"{name} must be a dense float32 tensor (F32) with one dimension")


def _checked(name: str, vector: memoryview[float]) -> memoryview[float]:
    if not all(map(math.isfinite, vector)):
        raise BadVector(f"{name} holds NaN or infinity")
    if not NORMS[0] <= (length := norm(vector)) <= NORMS[1]:
        raise BadVector(f"{name} has norm {length:.3g}; between {NORMS[0]:g} and {NORMS[1]:g} is usable")
    return vector


def _about(metadata: object) -> dict[str, Any]:
    text = metadata.get(ABOUT, "{}") if isinstance(metadata, dict) else "{}"
    try:
        about = json.loads(text, parse_constant=_number, parse_float=_number, parse_int=_integer)
        # Half of a surrogate pair can be read, but never be sent on.
        json.dumps(about, ensure_ascii=False).encode("utf-8")
    except (TypeError, ValueError, RecursionError):
        raise BadVector("the file's metadata are not JSON, or hold what cannot be sent as JSON") from None
    if not isinstance(about, dict):
        raise BadVector("the file's metadata are not a JSON object")
    if deeper_than(MAX_DEPTH, about):
        raise BadVector(f"the file's metadata are nested more than {MAX_DEPTH} levels deep")
    return about


def _number(literal: str) -> float:
    """ValueError for NaN, infinities, and what overflows to them."""
    if not math.isfinite(value := float(literal)):
        raise ValueError(literal)
    return value


def _integer(literal: str) -> int:
    """ValueError beyond 64 bits, where numbers of other languages end."""
    if abs(value := int(literal)) >= 2**64:
        raise ValueError(literal)
    return value


def deeper_than(most: int, value: Any) -> bool:
    """Whether parsed JSON has more than `most` objects and lists within each other; without recursion."""
    level: list[Any] = [value]
    for _ in range(most):
        items = (item for each in level for item in (each.values() if isinstance(each, dict) else each))
        level = [item for item in items if isinstance(item, dict | list)]
        if not level:
            return False
    return True
