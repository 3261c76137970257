"""steer_add_rmsnorm: every form against float64, and against the operations that it fuses."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor

from tests.kernels.support import CAPABILITIES, Compiled, bits, compile_ahead, poisoned, rms_ratio, runnable, tolerance
from thinkserve.kernels import steer, steer_add_rmsnorm

Runs = Callable[[], AbstractContextManager[None]]
Both = tuple[Tensor, Tensor]

EPS = 1e-6
FORMS: dict[str, Callable[..., None]] = {
    "steer_add_rmsnorm": steer_add_rmsnorm.steer_add_rmsnorm,
    "opaque": torch.ops.thinkserve.steer_add_rmsnorm.default,
    "native": steer_add_rmsnorm.steer_add_rmsnorm_native,
    "triton": steer_add_rmsnorm.steer_add_rmsnorm_triton,
}
SIZES = [(1, 96), (3, 127), (5, 4096), (2, 5120)]
MANY = [(4097, 96), (257, 5120)]
CPU = torch.device("cpu")


def batch(rows: int, size: int, dtype: torch.dtype, device: torch.device, k: int = 3) -> tuple[Tensor, ...]:
    """x, residual, weight, and a steering of most rows: vectors, index with -1 and duplicates, scale."""
    x, residual = (torch.randn(rows, size, device=device).to(dtype) for _ in range(2))
    weight, vectors = (torch.randn(*shape, device=device).to(dtype) for shape in ((size,), (5, size)))
    index = torch.randint(-1, 5, (rows, k), device=device)
    index[rows // 2] = 4
    index[rows // 3] = -1
    return x, residual, weight, vectors, index, torch.randn(rows, k, device=device)


def apply(form: str, runs: Runs, x: Tensor, residual: Tensor, weight: Tensor, *steering: Tensor) -> Both:
    """What `form` makes of x and residual; their own memory is left alone."""
    new, total = x.clone(), residual.clone()
    with runs():
        FORMS[form](new, total, weight, EPS, *steering)
    return new, total


def truth(x: Tensor, residual: Tensor, weight: Tensor, vectors: Tensor, index: Tensor, scale: Tensor) -> Both:
    """What x and residual should become, in float64."""
    return steer_add_rmsnorm.reference(x, residual, weight, EPS, vectors, index, scale)


def add_rmsnorm(x: Tensor, residual: Tensor, weight: Tensor) -> Both:
    """The operations of vLLM 0.32's native `fused_add_rms_norm`, in its order."""
    total = x.to(torch.float32) + residual.to(torch.float32)
    variance = total.pow(2).mean(dim=-1, keepdim=True)
    return (total * torch.rsqrt(variance + EPS)).to(weight.dtype) * weight, total.to(x.dtype)


@pytest.mark.parametrize(("form", "dtype"), runnable(FORMS))
@pytest.mark.parametrize(("rows", "size"), SIZES)
def test_the_sum_is_kept_and_its_norm_returned(
    form: str, dtype: torch.dtype, rows: int, size: int, device: torch.device, triton_runs: Runs
) -> None:
    """The error against float64 is that of the roundings: one of the residual, two of the norm."""
    tensors = batch(rows, size, dtype, device)
    x, residual = apply(form, triton_runs, *tensors)
    expected = truth(*tensors)

    assert rms_ratio(x, expected[0]) <= tolerance(dtype)
    assert rms_ratio(residual, expected[1]) <= tolerance(dtype)


@pytest.mark.parametrize(("rows", "size"), MANY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_rows_are_done_as_few_are(rows: int, size: int, dtype: torch.dtype, device: torch.device) -> None:
    """Enough rows for several threads and several blocks of rows in each."""
    tensors = batch(rows, size, dtype, device)
    x, residual = tensors[0].clone(), tensors[1].clone()
    steer_add_rmsnorm.steer_add_rmsnorm(x, residual, tensors[2], EPS, *tensors[3:])
    expected = truth(*tensors)

    assert rms_ratio(x, expected[0]) <= tolerance(dtype)
    assert rms_ratio(residual, expected[1]) <= tolerance(dtype)


@pytest.mark.parametrize("form", ["steer_add_rmsnorm", "native"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "size"), [(1, 127), (3, 40000), (9, 4096), (257, 96), (33, 5120)])
def test_on_the_cpu_unsteered_rows_equal_the_unfused_norm(
    form: str, dtype: torch.dtype, rows: int, size: int, triton_runs: Runs
) -> None:
    """Bit for bit, however many rows and whatever their neighbours do."""
    x, residual, weight, vectors, index, scale = batch(rows, size, dtype, CPU)
    off = (index < 0).all(dim=1)
    actual = apply(form, triton_runs, x, residual, weight, vectors, index, scale)
    expected = add_rmsnorm(x, residual, weight)

    assert off.any()
    assert torch.equal(bits(expected[0][off]), bits(actual[0][off]))
    assert torch.equal(bits(expected[1][off]), bits(actual[1][off]))


@pytest.mark.parametrize("form", ["steer_add_rmsnorm", "native"])
def test_on_the_cpu_in_float32_steered_rows_equal_the_unfused_pair(form: str, triton_runs: Runs) -> None:
    """Steering, then the norm: nothing is rounded in between, so fusing them changes no bit."""
    x, residual, weight, *steering = batch(17, 250, torch.float32, CPU)
    actual = apply(form, triton_runs, x, residual, weight, *steering)
    expected = add_rmsnorm(steer.native(x, *steering), residual, weight)

    assert torch.equal(bits(expected[0]), bits(actual[0]))
    assert torch.equal(bits(expected[1]), bits(actual[1]))


@pytest.mark.parametrize(("form", "dtype"), runnable(FORMS))
def test_the_residual_of_an_unsteered_row_is_the_plain_sum(
    form: str, dtype: torch.dtype, device: torch.device, triton_runs: Runs
) -> None:
    """On every device bit for bit; the norm is that of a batch which nobody steers."""
    x, residual, weight, vectors, index, scale = batch(9, 127, dtype, device)
    off = (index < 0).all(dim=1)
    actual = apply(form, triton_runs, x, residual, weight, vectors, index, scale)
    nobody = apply(form, triton_runs, x, residual, weight, vectors, torch.full_like(index, -1), scale)

    assert torch.equal(bits((x.float() + residual.float()).to(dtype)[off]), bits(actual[1][off]))
    assert torch.equal(bits(nobody[0][off]), bits(actual[0][off]))
    assert not torch.equal(bits(nobody[0]), bits(actual[0]))


@pytest.mark.parametrize(("form", "dtype"), runnable(FORMS))
def test_a_row_does_not_depend_on_its_place_or_its_neighbours(
    form: str, dtype: torch.dtype, device: torch.device, triton_runs: Runs
) -> None:
    """Rows in another order give the same rows in that order; a row alone gives the same as among others."""
    x, residual, weight, vectors, index, scale = batch(9, 127, dtype, device)
    order = torch.randperm(9, device=device)
    whole = apply(form, triton_runs, x, residual, weight, vectors, index, scale)
    moved = apply(form, triton_runs, x[order], residual[order], weight, vectors, index[order], scale[order])
    alone = apply(form, triton_runs, x[4:5], residual[4:5], weight, vectors, index[4:5], scale[4:5])

    for of_whole, of_moved, of_alone in zip(whole, moved, alone, strict=True):
        assert torch.equal(bits(of_whole[order]), bits(of_moved))
        assert torch.equal(bits(of_whole[4:5]), bits(of_alone))


@pytest.mark.parametrize(("form", "dtype"), runnable(FORMS))
def test_nothing_is_written_beside_a_row(
    form: str, dtype: torch.dtype, device: torch.device, triton_runs: Runs
) -> None:
    """Rows may lie in wider buffers: the rest stays as it was, and the rows have no trace of its NaN."""
    x, residual, *others = batch(5, 127, dtype, device)
    buffers = [poisoned(5, 127 + pad, dtype=dtype, device=device) for pad in (3, 9)]
    inner = [buffer[:, :127] for buffer in buffers]
    inner[0].copy_(x)
    inner[1].copy_(residual)
    before = [bits(buffer[:, 127:]) for buffer in buffers]
    weight, *steering = others
    with triton_runs():
        FORMS[form](*inner, weight, EPS, *steering)

    for rows, buffer, rest in zip(inner, buffers, before, strict=True):
        assert torch.equal(rest, bits(buffer[:, 127:]))
        assert not rows.isnan().any()


@pytest.mark.parametrize("form", ["steer_add_rmsnorm", "native"])
def test_vectors_may_be_more_exact_than_rows(form: str, device: torch.device, triton_runs: Runs) -> None:
    """A table in float32 steers rows in bfloat16."""
    x, residual, weight, vectors, *steering = batch(5, 127, torch.bfloat16, device)
    tensors = (x, residual, weight, vectors.float() * 1.001, *steering)
    expected = truth(*tensors)

    assert rms_ratio(apply(form, triton_runs, *tensors)[1], expected[1]) <= tolerance(torch.bfloat16)


def test_no_rows_are_nothing_to_do(device: torch.device, triton_runs: Runs) -> None:
    """An empty step stays empty."""
    x, residual, weight, vectors, index, scale = batch(4, 96, torch.float32, device)
    for form in ("steer_add_rmsnorm", "native", "triton"):
        empty = apply(form, triton_runs, x[:0], residual[:0], weight, vectors, index[:0], scale[:0])

        assert [(0, 96), (0, 96)] == [tuple(tensor.shape) for tensor in empty]


@pytest.mark.parametrize("form", ["steer_add_rmsnorm", "native"])
@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"residual": torch.zeros(3, 96)}, ValueError),
        ({"residual": torch.zeros(96, 4).T}, ValueError),
        ({"weight": torch.zeros(95)}, ValueError),
        ({"vectors": torch.zeros(5, 95)}, ValueError),
        ({"scale": torch.zeros(4, 2)}, ValueError),
        ({"residual": torch.zeros(4, 96, dtype=torch.bfloat16)}, TypeError),
        ({"weight": torch.zeros(96, dtype=torch.bfloat16)}, TypeError),
        ({"index": torch.zeros(4, 3, dtype=torch.int32)}, TypeError),
        ({"index": torch.full((4, 3), 5)}, IndexError),
    ],
)
def test_what_does_not_fit_is_refused(form: str, change: dict[str, Tensor], error: type[Exception]) -> None:
    """The CPU's forms agree on what they refuse, and on how."""
    names = ("x", "residual", "weight", "vectors", "index", "scale")
    given = dict(zip(names, batch(4, 96, torch.float32, CPU), strict=True)) | change
    x, residual, weight, *steering = given.values()

    with pytest.raises(error):
        FORMS[form](x, residual, weight, EPS, *steering)


def test_the_op_is_honest_about_what_it_writes(device: torch.device) -> None:
    """Its schema and its fake agree with what the kernel does."""
    x, residual, weight, *steering = batch(4, 96, torch.float32, device)
    op = torch.ops.thinkserve.steer_add_rmsnorm.default

    torch.library.opcheck(op, (x, residual, weight, EPS, *steering), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("device_type", "size", "cpp", "expected"),
    [
        ("cuda", 5120, False, "triton"),
        ("cuda", 20000, False, "native"),
        ("cpu", 256, True, "cpp"),
        ("cpu", 256, False, "native"),
        ("xpu", 256, False, "native"),
    ],
)
def test_the_provider_depends_on_the_device_the_size_and_on_what_could_be_built(
    device_type: str, size: int, cpp: bool, expected: str
) -> None:
    """C++ where it compiles, Triton on a GPU, else PyTorch."""
    assert expected == steer_add_rmsnorm.provider(device_type, size, cpp=cpp)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize(("size", "aligned"), [(127, False), (5120, True), (16384, True)])
def test_the_kernel_compiles_without_spilling(capability: int, dtype: str, size: int, aligned: bool) -> None:
    """For an A100, an H100 and a B200, whether or not one is here, up to the longest row."""
    rows = dict.fromkeys(("x", "residual", "weight", "vectors"), f"*{dtype}")
    pointers = rows | {"index": "*i64", "scale": "*fp32"}
    sizes = {"size": "i32", "stride_x": "i64", "stride_residual": "i64"}
    signature = pointers | sizes | {"eps": "fp32", "slots": "i32"}
    block, warps = steer_add_rmsnorm.shape_of(size)
    multiples = {*pointers, *sizes} if aligned else set()
    kernel = steer_add_rmsnorm.steer_add_rmsnorm_kernel
    made = compile_ahead(kernel, signature, {"K": 4, "BLOCK": block}, capability, warps=warps, aligned=multiples)

    assert Compiled(made.registers, 0) == made
    assert 0 < made.registers * warps * 32 <= 65536
