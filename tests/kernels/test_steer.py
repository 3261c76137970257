"""steer: every form against float64, and the promise that a row nobody steers keeps its bits."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.support import CAPABILITIES, Compiled, bits, compile_ahead, poisoned, rms_ratio, runnable, tolerance
from thinkserve.kernels import cpu, providers, steer

Runs = Callable[[], AbstractContextManager[None]]

FORMS: dict[str, Callable[..., None]] = {
    "steer": steer.steer,
    "opaque": torch.ops.thinkserve.steer.default,
    "native": steer.steer_native,
    "inductor": lambda hidden, *steering: hidden.copy_(steer.native(hidden, *steering)),
    "triton": steer.steer_triton,
}
SIZES = [(1, 96), (3, 127), (5, 4096), (2, 5120)]
MANY = [(4097, 96), (513, 5120)]


def batch(rows: int, size: int, dtype: torch.dtype, device: torch.device, k: int = 3) -> tuple[Tensor, ...]:
    """Rows within a wider buffer of NaN, a table of five vectors, and an index with -1 and duplicates in it."""
    hidden = poisoned(rows, size + 5, dtype=dtype, device=device)[:, :size]
    hidden.copy_(torch.randn(rows, size, device=device))
    vectors = torch.randn(5, size, device=device).to(dtype)
    index = torch.randint(-1, 5, (rows, k), device=device)
    index[rows // 2] = 4
    index[rows // 3] = -1
    return hidden, vectors, index, torch.randn(rows, k, device=device)


def apply(form: str, runs: Runs, *tensors: Tensor) -> Tensor:
    """What `form` makes of the rows; their own memory is left alone."""
    hidden = tensors[0].clone()
    with runs():
        FORMS[form](hidden, *tensors[1:])
    return hidden


def table(rows: list[list[float]], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(rows, dtype=dtype, device=device)


@pytest.mark.parametrize(("form", "dtype"), runnable(FORMS))
@pytest.mark.parametrize(("rows", "size"), SIZES)
def test_a_steered_row_is_the_row_and_its_vectors_times_their_strengths(
    form: str, dtype: torch.dtype, rows: int, size: int, device: torch.device, triton_runs: Runs
) -> None:
    """The error against float64 is that of one rounding."""
    tensors = batch(rows, size, dtype, device)

    assert rms_ratio(apply(form, triton_runs, *tensors), steer.reference(*tensors)) <= tolerance(dtype)


@pytest.mark.parametrize(("rows", "size"), MANY)
def test_many_rows_are_steered_as_few_are(rows: int, size: int, device: torch.device) -> None:
    """Enough rows for several threads, or for many blocks of a GPU."""
    tensors = batch(rows, size, torch.bfloat16, device)
    expected = steer.reference(*tensors)
    steer.steer(*tensors)

    assert rms_ratio(tensors[0], expected) <= tolerance(torch.bfloat16)


@pytest.mark.parametrize(("form", "dtype"), runnable(FORMS))
def test_nothing_is_written_beside_a_row(
    form: str, dtype: torch.dtype, device: torch.device, triton_runs: Runs
) -> None:
    """Rows may lie in a wider buffer: the rest of it stays as it was, and the rows have no trace of its NaN."""
    buffer = poisoned(7, 127 + 9, dtype=dtype, device=device)
    hidden, *steering = batch(7, 127, dtype, device)
    before = bits(buffer[:, 127:])
    inner = buffer[:, :127]
    inner.copy_(hidden)
    with triton_runs():
        FORMS[form](inner, *steering)

    assert torch.equal(before, bits(buffer[:, 127:]))
    assert not inner.isnan().any()


@pytest.mark.parametrize(("form", "dtype"), runnable(FORMS))
def test_an_unsteered_row_keeps_its_bits(
    form: str, dtype: torch.dtype, device: torch.device, triton_runs: Runs
) -> None:
    """Also -0.0, infinities and the payload of a NaN, which an addition of zero would change."""
    hidden, vectors, index, scale = batch(6, 96, dtype, device)
    odd = torch.arange(96, device=device) + (0x7F812300 if dtype.itemsize == 4 else 0x7F81)
    hidden.view(torch.int32 if dtype.itemsize == 4 else torch.int16)[::2] = odd.to(
        torch.int32 if dtype.itemsize == 4 else torch.int16
    )
    hidden[::2, :4] = table([[-0.0, 0.0, float("inf"), -float("inf")]], dtype, device)
    index[::2] = -1
    result = apply(form, triton_runs, hidden, vectors, index, scale)

    assert torch.equal(bits(hidden[::2]), bits(result[::2]))
    assert not torch.equal(bits(hidden[1::2]), bits(result[1::2]))


@pytest.mark.parametrize("form", FORMS)
def test_vectors_are_summed_in_the_order_of_the_index(form: str, device: torch.device, triton_runs: Runs) -> None:
    """In float32 a small vector is lost beside a large one, unless the large ones have cancelled before."""
    vectors = table([[1e8] * 96, [1.0] * 96], torch.float32, device)
    index = torch.tensor([[0, 1, 0], [0, 0, 1], [-1, 1, 1]], device=device)
    scale = table([[1, 1, -1], [1, -1, 1], [5, 1, 1]], torch.float32, device)
    hidden = torch.zeros(3, 96, device=device)

    assert [0.0, 1.0, 2.0] == apply(form, triton_runs, hidden, vectors, index, scale)[:, 0].tolist()


@pytest.mark.parametrize("form", ["steer", "native", "inductor"])
def test_the_sum_is_rounded_once(form: str, device: torch.device, triton_runs: Runs) -> None:
    """256 + 1 is 256 in bfloat16, but 256 + 1 + 1 is 258: the same vector twice counts twice."""
    hidden = torch.full((1, 127), 256.0, dtype=torch.bfloat16, device=device)
    vectors = torch.ones(1, 127, dtype=torch.bfloat16, device=device)
    index = torch.zeros(1, 2, dtype=torch.int64, device=device)
    result = apply(form, triton_runs, hidden, vectors, index, torch.ones(1, 2, device=device))

    assert {258.0} == {*result.flatten().tolist()}


@pytest.mark.parametrize(("form", "dtype"), runnable(FORMS))
def test_a_row_does_not_depend_on_its_place_or_its_neighbours(
    form: str, dtype: torch.dtype, device: torch.device, triton_runs: Runs
) -> None:
    """Rows in another order give the same rows in that order; a row alone gives the same as among others."""
    hidden, vectors, index, scale = batch(9, 127, dtype, device)
    order = torch.randperm(9, device=device)
    whole = apply(form, triton_runs, hidden, vectors, index, scale)
    moved = apply(form, triton_runs, hidden[order], vectors, index[order], scale[order])
    alone = apply(form, triton_runs, hidden[4:5], vectors, index[4:5], scale[4:5])

    assert torch.equal(bits(whole[order]), bits(moved))
    assert torch.equal(bits(whole[4:5]), bits(alone))


@pytest.mark.parametrize("form", ["steer", "native", "inductor"])
def test_vectors_may_be_more_exact_than_rows(form: str, device: torch.device, triton_runs: Runs) -> None:
    """A table in float32 steers rows in bfloat16."""
    hidden, vectors, index, scale = batch(5, 127, torch.bfloat16, device)
    tensors = (hidden, vectors.float() * 1.001, index, scale)

    assert rms_ratio(apply(form, triton_runs, *tensors), steer.reference(*tensors)) <= tolerance(torch.bfloat16)


def test_on_the_cpu_the_compiled_form_equals_pytorch_bit_for_bit() -> None:
    """Who has a compiler and who has none get the same tokens."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        tensors = batch(33, 250, dtype, torch.device("cpu"))
        expected = steer.native(*tensors)
        steer.steer(*tensors)

        assert torch.equal(bits(expected), bits(tensors[0]))


def test_no_rows_and_no_vectors_are_nothing_to_do(device: torch.device, triton_runs: Runs) -> None:
    """An empty step, and an index without columns."""
    hidden, vectors, index, scale = batch(4, 96, torch.float32, device)
    for form in ("steer", "native", "triton"):
        empty = apply(form, triton_runs, hidden[:0], vectors, index[:0], scale[:0])
        plain = apply(form, triton_runs, hidden, vectors, index[:, :0].contiguous(), scale[:, :0].contiguous())

        assert (0, 96) == empty.shape
        assert torch.equal(bits(hidden), bits(plain))


@pytest.mark.parametrize("form", ["steer", "native"])
@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"vectors": torch.zeros(5, 95)}, ValueError),
        ({"index": torch.zeros(3, 3, dtype=torch.int64)}, ValueError),
        ({"index": torch.zeros(4, 3, dtype=torch.int64).T.contiguous().T}, ValueError),
        ({"scale": torch.zeros(4, 2)}, ValueError),
        ({"hidden": torch.zeros(96, 4).T}, ValueError),
        ({"index": torch.zeros(4, 3, dtype=torch.int32)}, TypeError),
        ({"scale": torch.zeros(4, 3, dtype=torch.float64)}, TypeError),
        ({"vectors": torch.zeros(5, 96, dtype=torch.float16)}, TypeError),
        ({"index": torch.full((4, 3), 5)}, IndexError),
    ],
)
def test_what_does_not_fit_is_refused(form: str, change: dict[str, Tensor], error: type[Exception]) -> None:
    """The CPU's forms agree on what they refuse, and on how."""
    names = ("hidden", "vectors", "index", "scale")
    given = dict(zip(names, batch(4, 96, torch.float32, torch.device("cpu")), strict=True)) | change

    with pytest.raises(error):
        FORMS[form](*given.values())


def test_the_op_is_opaque_and_honest_about_what_it_writes(device: torch.device) -> None:
    """One node in a graph without breaks, whose schema and fake agree with what the kernel does."""
    tensors = batch(4, 96, torch.float32, device)
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    expected = steer.native(*tensors)
    torch.compile(steer.steer, backend=backend, fullgraph=True)(*tensors)
    targets = [node.target for graph in graphs for node in graph.graph.nodes if node.op == "call_function"]

    assert [torch.ops.thinkserve.steer.default] == targets
    assert rms_ratio(tensors[0], expected) <= tolerance(torch.float32)
    torch.library.opcheck(torch.ops.thinkserve.steer.default, tensors, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("device_type", "cpp", "expected"),
    [("cuda", False, "triton"), ("cpu", True, "cpp"), ("cpu", False, "native"), ("xpu", False, "native")],
)
def test_the_provider_depends_on_the_device_and_on_what_could_be_built(
    device_type: str, cpp: bool, expected: str
) -> None:
    """C++ where it compiles, Triton on a GPU, else PyTorch."""
    assert expected == providers.provider(device_type, cpp=cpp)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(("dtype", "table"), [("bf16", "bf16"), ("fp32", "fp32"), ("bf16", "fp32"), ("fp16", "fp32")])
@pytest.mark.parametrize("aligned", [True, False])
def test_the_kernel_compiles_without_spilling(capability: int, dtype: str, table: str, aligned: bool) -> None:
    """For an A100, an H100 and a B200, whether or not one is here; sizes that are multiples of 16 and others.

    The worker's table is of float32, whatever the rows are.
    """
    pointers = {"hidden": f"*{dtype}", "vectors": f"*{table}", "index": "*i64", "scale": "*fp32"}
    signature = pointers | {"size": "i32", "stride": "i64", "slots": "i32"}
    multiples = {*pointers, "size", "stride"} if aligned else set()
    constants = {"K": 4, "BLOCK": steer.BLOCK}
    made = compile_ahead(steer.steer_kernel, signature, constants, capability, warps=steer.WARPS, aligned=multiples)

    assert Compiled(made.registers, 0) == made
    assert 0 < made.registers <= 128


def test_without_a_compiler_there_is_no_compiled_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is said once, and PyTorch's form is taken."""
    monkeypatch.setenv("THINKSERVE_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with caplog.at_level(logging.WARNING):
        found = cpu.op.__wrapped__("steer")

    assert found is None
    assert ["no C++ compiler"] == [record.args[1] for record in caplog.records if isinstance(record.args, tuple)]


def test_the_compiler_s_complaint_is_passed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A source that does not compile is a warning with the first error in it, and leaves nothing in the cache."""
    (tmp_path / "broken.cpp").write_text("int main() { return nothing; }")
    monkeypatch.setattr(cpu, "SOURCES", tmp_path)
    monkeypatch.setenv("THINKSERVE_CACHE", str(tmp_path / "cache"))
    with caplog.at_level(logging.WARNING):
        found = cpu.op.__wrapped__("broken")

    assert found is None
    assert "nothing" in caplog.text
    assert [] == list((tmp_path / "cache").rglob("*.so"))


def test_compiled_forms_never_lie_below_the_working_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables that are set to nothing are as good as not set."""
    for name in ("THINKSERVE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, "")

    assert Path.home() / ".cache" / "thinkserve" / "kernels" == cpu._cache()


def test_the_compiled_forms_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """THINKSERVE_KERNELS=0 is for comparing, and for a machine whose compiler is not to be trusted."""
    monkeypatch.setenv("THINKSERVE_KERNELS", "0")

    assert cpu.op.__wrapped__("steer") is None
