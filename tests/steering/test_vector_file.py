"""The file of a vector: what is written is read again, and nothing else is believed."""

from __future__ import annotations

import json
import math
import pickle
from array import array
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinkserve.steering.fingerprint import fingerprint
from thinkserve.steering.vector_file import MAX_HEADER_BYTES, BadVector, VectorFile, parse, serialize, view


def floats(*values: float) -> bytes:
    return array("f", values).tobytes()


def vector(*layers: int, about: dict[str, Any] | None = None) -> VectorFile:
    return VectorFile({layer: view(floats(3.0, 4.0, layer)) for layer in layers}, about or {})


def raw(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(begin: int = 0, end: int = 8, dtype: str = "F32", shape: object = (2,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def told(about: str) -> bytes:
    """A good vector of which `about` is said."""
    return raw({"layer.1": entry(), "__metadata__": {"thinkserve.steering": about}}, ONE)


ONE = floats(1.0, 2.0)


def test_a_vector_survives_its_file() -> None:
    """Layers, numbers, what is said about it, and therefore its id."""
    file = vector(0, 5, about={"recipe": "asc", "n": 50, "sign": {"cosine": 0.5}})

    again = parse(serialize(file))

    assert file == again
    assert (file.id, 3, [0, 5]) == (again.id, again.hidden, list(again.layers))
    assert {0: 5.0, 5: pytest.approx(math.sqrt(50))} == again.norms


def test_other_readers_of_the_format_read_it(tmp_path: Path) -> None:
    """The reference implementation finds the tensors under their names."""
    load = pytest.importorskip("safetensors.numpy").load

    found = load(serialize(vector(2, 11)))

    assert {"layer.2": [3.0, 4.0, 2.0], "layer.11": [3.0, 4.0, 11.0]} == {n: list(t) for n, t in found.items()}


def test_files_of_other_writers_are_read() -> None:
    """As the reference implementation writes them, with metadata of others or none."""
    save = pytest.importorskip("safetensors.numpy").save
    numpy = pytest.importorskip("numpy")

    file = parse(save({"layer.3": numpy.array([1, 2], "float32")}, {"format": "pt"}))

    assert ({3: [1.0, 2.0]}, {}) == ({layer: list(v) for layer, v in file.layers.items()}, file.about)


def test_the_id_is_the_content() -> None:
    """Another number or another layer is another id; what is said about the vector is not."""
    ids = [
        vector(1).id, VectorFile({2: vector(1).layers[1]}).id, vector(1, 2).id, vector(2).id,
    ]  # fmt: skip

    assert len(ids) == len(set(ids))
    assert vector(1).id == vector(1, about={"recipe": "asc"}).id


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "cut off"),
        (b"\0" * 8, "cut off"),
        ((2**62).to_bytes(8, "little") + b"{}", "too large"),
        (raw(b"{" + b" " * MAX_HEADER_BYTES + b"}"), "too large"),
        (pickle.dumps([1.0] * 9), "header"),
        (raw(b"[" * 9000), "not JSON"),
        (raw(b"\xff\xfe"), "not JSON"),
        (raw([]), "not an object"),
        (raw({}), "no tensor"),
        (raw({"__metadata__": {}}), "no tensor"),
        (raw({"w": entry()}, ONE), "named layer"),
        (raw({"layer.-1": entry()}, ONE), "named layer"),
        (raw({"layer.01": entry()}, ONE), "named layer"),
        (raw(b'{"layer.1": 1, "layer.1": 2}'), "twice"),
        (raw({"layer.1": entry(dtype="F8_E4M3")}, ONE), "dense float32"),
        (raw({"layer.1": entry(dtype="I32")}, ONE), "dense float32"),
        (raw({"layer.1": entry(dtype="C64")}, ONE), "dense float32"),
        (raw({"layer.1": entry(shape=[])}, ONE), "one dimension"),
        (raw({"layer.1": entry(shape=[1, 1, 2])}, ONE), "one dimension"),
        (raw({"layer.1": entry(shape=[2**62])}, ONE), "too large"),
        (raw({"layer.1": entry(shape=[0], end=0)}), "empty"),
        (raw({"layer.1": entry()}, ONE[:-1]), "cut off"),
        (raw({"layer.1": entry(-8, 0)}, ONE), "cut off"),
        (raw({"layer.1": entry()}, ONE + b"more"), "unused"),
        (raw({"layer.1": entry(), "layer.2": entry()}, ONE), "overlap"),
        (raw({"layer.1": entry(), "layer.2": entry(8, 12, shape=[1])}, ONE + floats(1)), "differ in size"),
        (raw({"layer.1": entry()}, floats(1.0, math.nan)), "NaN"),
        (raw({"layer.1": entry()}, floats(-math.inf, 1.0)), "infinity"),
        (raw({"layer.1": entry()}, floats(0.0, 0.0)), "norm 0"),
        (raw({"layer.1": entry()}, floats(1e-40, 0.0)), "norm 1e-40"),
        (raw({"layer.1": entry()}, floats(1e30, 0.0)), "norm 1e+30"),
        (raw({"layer.1": entry(), "__metadata__": {"thinkserve.steering": "{"}}, ONE), "metadata"),
        (raw({"layer.1": entry(), "__metadata__": {"thinkserve.steering": "NaN"}}, ONE), "metadata"),
        (raw({"layer.1": entry(), "__metadata__": {"thinkserve.steering": 5}}, ONE), "metadata"),
        (raw(b'{"layer.1": ' + b"1" * 5000 + b"}", ONE), "not JSON"),
        (raw(b'{"__metadata__": {"n": ' + b"1" * 5000 + b"}}", ONE), "not JSON"),
        (told("[]"), "not a JSON object"),
        (told('{"n": 1e999}'), "metadata"),
        (told('{"n": [-1e999]}'), "metadata"),
        (told('{"n": Infinity}'), "metadata"),
        (told('{"n": ' + "1" * 5000 + "}"), "metadata"),
        (told('{"n": ' + "1" * 4000 + "}"), "metadata"),
        (told(f'{{"n": {-(2**64)}}}'), "metadata"),
        (told('{"recipe": "\\ud800"}'), "metadata"),
        (told('{"recipe": "\ud800"}'), "metadata"),
        (told('{"a": [{"\\udfff": 1}]}'), "metadata"),
        (told('{"a": ' + "[" * 64 + "]" * 64 + "}"), "more than 64 levels"),
        (told('{"a": ' * 200 + "1" + "}" * 200), "more than 64 levels"),
        (told('{"a": ' + "[" * 20000 + "]" * 20000 + "}"), "metadata"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_vector_is_refused_with_the_reason(content: bytes, reason: str) -> None:
    """Pickles, sizes from nowhere, other types and shapes, numbers that would break a forward pass."""
    with pytest.raises(BadVector, match=reason.replace("+", r"\+")):
        parse(content)


@pytest.mark.parametrize(
    "about",
    [
        {},
        {"n": 2**64 - 1, "m": -(2**64) + 1},
        {"n": -0.0, "tiny": 5e-324},
        {"recipe": "schnell \U0001f600 \x00"},
        {"calibration": [None, True, "x"]},
        {"a": json.loads("[" * 63 + "]" * 63)},
    ],
)
def test_whatever_can_be_sent_as_json_may_be_said_of_a_vector(about: dict[str, Any]) -> None:
    """Also by other writers, who do not escape what is not ASCII."""
    assert about == parse(serialize(vector(1, about=about))).about == parse(told(json.dumps(about))).about
    assert about == parse(told(json.dumps(about, ensure_ascii=False))).about


@given(st.text(max_size=200))
def test_whatever_is_said_of_a_vector_can_be_sent_on_or_is_refused(about: str) -> None:
    """No other exception comes out."""
    with suppress(BadVector):
        json.dumps(parse(told(about)).about, ensure_ascii=False, allow_nan=False).encode("utf-8")


@given(st.binary(max_size=200))
def test_any_bytes_are_a_vector_or_refused(content: bytes) -> None:
    """No other exception comes out, also behind a plausible header length."""
    for each in (content, raw(content), raw({"layer.1": entry()}, content)):
        with suppress(BadVector):
            assert parse(each).hidden > 0


@pytest.mark.parametrize("change", [lambda b: b[:-1] + b"\1", lambda b: b + b"\0"], ids=["number", "size"])
def test_the_fingerprint_is_the_models(tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    """The same folder gives the same; a single other number or byte gives another."""
    (tmp_path / "config.json").write_text("{}")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"\0" * 10000)
    first, again = fingerprint(tmp_path), fingerprint(tmp_path)
    weights.write_bytes(change(weights.read_bytes()))

    assert first == again != fingerprint(tmp_path)
