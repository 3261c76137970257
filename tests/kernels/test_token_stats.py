"""token_stats: six numbers of a row of logits, the same by every form of the kernel."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor

from tests.kernels.support import CAPABILITIES, DTYPES, compile_ahead, rms_ratio
from thinkserve.kernels import cpu
from thinkserve.kernels import token_stats as module
from thinkserve.kernels.providers import provider
from thinkserve.kernels.token_stats import COLUMNS, merge_kernel, native, part_kernel, reference, token_stats

Form = Callable[..., Tensor]
INFINITY = math.inf
LARGE = 152064
# float32 sums of a row, whatever type it was read in: the reference reads the same rounded logits.
ALLOWED = 5e-6


@pytest.fixture(params=["native", "cpp", "triton", "public"])
def form(
    request: pytest.FixtureRequest, device: torch.device, triton_runs: Callable[[], AbstractContextManager[None]]
) -> Form:
    """Every form of the kernel that runs on this machine."""
    if request.param == "cpp":
        compiled = cpu.op("token_stats") if device.type == "cpu" else None
        return compiled or pytest.skip("no C++ form here")

    def interpreted(logits: Tensor, vocab: int, close: int = -1) -> Tensor:
        if logits.dtype is not torch.float32 and device.type == "cpu":
            pytest.skip("the interpreter knows float32 only")
        with triton_runs():
            return module.fused(logits, vocab, close)

    forms: dict[str, Form] = {"native": native, "triton": interpreted, "public": token_stats}
    return forms[request.param]


def logits_of(rows: int, width: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(rows, width, device=device) * 4 + 3).to(dtype)


def column(stats: Tensor, name: str) -> list[float]:
    values: list[float] = stats[:, COLUMNS.index(name)].tolist()
    return values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "vocab", "width"), [(1, 2, 2), (5, 503, 640), (9, 640, 640), (1, LARGE, LARGE)])
def test_every_form_computes_what_is_defined(
    form: Form, rows: int, vocab: int, width: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Each column alone, so that no large number covers for a small one."""
    logits = logits_of(rows, width, device, dtype)

    stats, expected = form(logits, vocab, 1), reference(logits, vocab, 1)

    assert (rows, 6) == stats.shape
    assert torch.float32 == stats.dtype
    assert [] == [c for i, c in enumerate(COLUMNS) if not rms_ratio(stats[:, i], expected[:, i]) <= ALLOWED]


@pytest.mark.parametrize("form", ["native", "cpp", "public"], indirect=True)
@pytest.mark.parametrize(("rows", "vocab"), [(4097, 503), (3, LARGE)])
def test_every_form_computes_it_for_many_rows_and_for_long_ones(
    form: Form, rows: int, vocab: int, device: torch.device
) -> None:
    """More than any core takes at once; in Triton's interpreter it would take minutes."""
    logits = logits_of(rows, vocab, device)

    stats, expected = form(logits, vocab, 1), reference(logits, vocab, 1)

    assert [] == [c for i, c in enumerate(COLUMNS) if not rms_ratio(stats[:, i], expected[:, i]) <= ALLOWED]


def test_self_certainty_of_known_rows(form: Form, device: torch.device) -> None:
    """0 for a uniform row, and the value of the closed form for logits 0, 1, 2, 3."""
    rows = torch.tensor([[1.5, 1.5, 1.5, 1.5], [0.0, 1.0, 2.0, 3.0]], device=device)

    assert pytest.approx([0, 0.553895], abs=1e-6) == column(form(rows, 4), "certainty")
    assert pytest.approx([math.log(4), 0.947537], abs=1e-6) == column(form(rows, 4), "entropy")


def test_a_constant_added_to_all_logits_changes_only_their_size(form: Form, device: torch.device) -> None:
    """logsumexp and mean move by it; what describes the distribution stays."""
    logits = torch.randint(-40, 40, (4, 503), device=device) / 8

    before, after = form(logits, 503, 9), form(logits + 512, 503, 9)

    torch.testing.assert_close(after[:, :2] - 512, before[:, :2], rtol=0, atol=2e-4)
    torch.testing.assert_close(after[:, 2:], before[:, 2:], rtol=0, atol=2e-4)


@pytest.mark.parametrize("padding", [1e4, -INFINITY, math.nan])
def test_padding_never_counts(form: Form, padding: float, device: torch.device) -> None:
    """Whatever lies beyond the vocabulary, in the row or after it, the numbers are the same bits."""
    logits = logits_of(3, 640, device)
    padded = logits.clone()
    padded[:, 503:] = padding

    assert form(logits, 503, 7).tolist() == form(padded, 503, 7).tolist()


def test_an_entry_of_minus_infinity_adds_nothing_to_the_entropy(form: Form, device: torch.device) -> None:
    """The mean is -inf then and the certainty +inf; the other numbers are those of the row without it."""
    logits = logits_of(2, 503, device)
    logits[0, :490] = -INFINITY
    logits[1, 300] = -INFINITY

    stats = form(logits, 503, 502)

    assert [-INFINITY, -INFINITY] == column(stats, "mean")
    assert [INFINITY, INFINITY] == column(stats, "certainty")
    alone = reference(logits[:1, 490:], 13, 12)
    torch.testing.assert_close(stats[:1, [0, 3, 4, 5]].double(), alone[:, [0, 3, 4, 5]], rtol=1e-5, atol=1e-5)


def test_the_margin_and_the_odds_of_closing(form: Form, device: torch.device) -> None:
    """Against the best other token: negative while another leads, the margin itself when it leads, 0 at a tie."""
    rows = torch.tensor([[4.0, 1.0, 2.5], [1.0, 4.0, 2.5], [4.0, 4.0, 2.5]], device=device)

    assert [1.5, 1.5, 0] == column(form(rows, 3, 1), "margin")
    assert [-3, 1.5, 0] == column(form(rows, 3, 1), "close")
    assert [-INFINITY] * 3 == column(form(rows, 3), "close")


def test_a_closing_token_that_cannot_be_sampled(form: Form, device: torch.device) -> None:
    """Its odds are -inf, not NaN."""
    rows = torch.tensor([[4.0, -INFINITY, 2.5]], device=device)

    assert [-INFINITY] == column(form(rows, 3, 1), "close")


def test_huge_and_tiny_logits_do_not_overflow(form: Form, device: torch.device) -> None:
    """Sums are relative to the largest entry."""
    rows = torch.tensor([[30000.0, 29999.0, -30000.0, 0.0], [-30000.0, -30001.0, -30000.5, -30004.0]], device=device)

    torch.testing.assert_close(form(rows, 4, 3).double(), reference(rows, 4, 3), rtol=1e-6, atol=1e-2)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_row_does_not_know_its_neighbours(form: Form, device: torch.device) -> None:
    """Rows permuted give results permuted, bit for bit, also beside a row of NaN."""
    logits = logits_of(7, 503, device)
    order = torch.tensor([3, 1, 6, 0, 5, 2, 4], device=device)
    beside = logits.clone()
    beside[4] = math.nan

    stats = form(logits, 503, 7)

    assert stats[order].tolist() == form(logits[order], 503, 7).tolist()
    assert stats[:4].tolist() == form(beside, 503, 7)[:4].tolist()


def test_no_rows_give_no_statistics(form: Form, device: torch.device) -> None:
    """A step in which nobody asks."""
    assert (0, 6) == form(torch.empty(0, 503, device=device), 503).shape


def test_rows_may_lie_apart_or_in_columns(device: torch.device) -> None:
    """A view of a wider buffer is read in place, a transposed one is copied."""
    wide = logits_of(6, 700, device)
    expected = token_stats(wide[::2, 100:603].contiguous(), 503, 7)

    assert expected.tolist() == token_stats(wide[::2, 100:603], 503, 7).tolist()
    assert expected.tolist() == token_stats(wide[::2, 100:603].t().contiguous().t(), 503, 7).tolist()


@pytest.mark.parametrize(("vocab", "close"), [(641, -1), (1, -1), (0, -1), (640, 640), (640, -2), (503, 503)])
def test_a_vocabulary_or_token_that_does_not_fit_is_refused(vocab: int, close: int, device: torch.device) -> None:
    """Nothing is read past a row."""
    with pytest.raises(ValueError, match="vocabulary"):
        token_stats(logits_of(2, 640, device), vocab, close)


def test_the_op_is_registered_as_pytorch_wants_it(device: torch.device) -> None:
    """Schema, fake tensors and dispatch agree."""
    torch.library.opcheck(module._opaque, (logits_of(2, 503, device), 503, 7))


def test_one_opaque_node_in_a_compiled_graph(device: torch.device) -> None:
    """Dynamo does not look inside, and the numbers are those of an eager call."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    logits = logits_of(2, 503, device)
    compiled = torch.compile(lambda rows: token_stats(rows, 503, 7), backend=keep, fullgraph=True)

    assert token_stats(logits, 503, 7).tolist() == compiled(logits).tolist()
    assert ["thinkserve.token_stats.default"] == [
        str(n.target) for n in graphs[0].graph.nodes if n.op == "call_function"
    ]


def test_who_runs_it_where() -> None:
    """Triton on a GPU, C++ on a CPU where it was built, PyTorch elsewhere."""
    assert "triton" == provider("cuda", cpp=False)
    assert "cpp" == provider("cpu", cpp=True)
    assert ["native", "native"] == [provider("cpu", cpp=False), provider("xpu", cpp=True)]


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("element", ["*bf16", "*fp32"])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_kernel_of_a_part_spills_nothing(capability: int, element: str, *, whole: bool) -> None:
    """Registers hold all that a lane keeps, on every generation."""
    signature = {"logits": element, "out": "*fp32", "stride": "i64", "vocab": "i32", "close": "i32", "span": "i32"}
    constants = {"lanes": module.LANES, "whole": whole}

    assert 0 == compile_ahead(part_kernel, signature, constants, capability, warps=8).spills


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_kernel_that_merges_parts_spills_nothing(capability: int) -> None:
    """The parts of the largest vocabulary in one warp."""
    names = {"logits": "*bf16", "sums": "*fp32", "out": "*fp32", "stride": "i64"}
    signature = names | dict.fromkeys(("vocab", "close", "parts"), "i32")

    assert 0 == compile_ahead(merge_kernel, signature, {"lanes": 128}, capability, warps=1).spills
