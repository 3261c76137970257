"""guide: budget guidance of one step, and the incomplete gamma function under it, the same by every form."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from tests.kernels.support import CAPABILITIES, DTYPES, compile_ahead, rms_ratio
from thinkserve.kernels import cpu
from thinkserve.kernels import guide as module
from thinkserve.kernels.gamma import gamma_cdf, log_cdf, log_gamma_cdf
from thinkserve.kernels.guide import guide, native, normalise_kernel, reference, score_kernel
from thinkserve.kernels.providers import provider

Form = Callable[..., Tensor]
INFINITY = math.inf
PUBLISHED = (10.0, 1.0, 0.9)
# No prediction is masked: rates, shapes and modes of any size count.
OPEN = (0.0, 0.0, -0.999999)


@pytest.fixture(params=["native", "cpp", "triton", "public"])
def form(
    request: pytest.FixtureRequest, device: torch.device, triton_runs: Callable[[], AbstractContextManager[None]]
) -> Form:
    """Every form of the kernel that runs on this machine, with the published masks unless others are given."""
    compiled = cpu.op("guide") if device.type == "cpu" and request.param == "cpp" else None
    # The interpreter's time goes by programs, not by their size.
    block = module.BLOCK if device.type == "cuda" else 65536

    def fused(logits: Tensor, *rest: Any) -> Tensor:
        if logits.dtype is not torch.float32 and device.type == "cpu":
            pytest.skip("the interpreter knows float32 only")
        with triton_runs():
            return module.fused(logits, *rest, block=min(block, triton.next_power_of_2(logits.shape[1])))

    forms: dict[str, Form | None] = {"native": native, "cpp": compiled, "triton": fused, "public": guide}
    chosen = forms[request.param] or pytest.skip("no C++ form here")

    def run(*inputs: Tensor, masks: tuple[float, float, float] = PUBLISHED) -> Tensor:
        return chosen(*inputs, *masks)

    return run


def predictions(rows: int, vocab: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """alpha, lam and budgets of which each mask drops a part: modes from below one token to thousands."""
    mode, lam = torch.rand(rows, vocab, device=device) * 8, torch.rand(rows, vocab, device=device) * 20 + 5
    return mode * lam + 0.8, lam, torch.rand(rows, device=device) * 2000 + 1


def series(alpha: Tensor, x: Tensor) -> Tensor:
    """ln P(alpha, x) by its power series in float64: with positive terms only, none cancels."""
    term = torch.ones_like(x)
    total = term.clone()
    for n in range(1, 1500):
        term = term * x / (alpha + n)
        total += term
    return alpha * x.log() - x - (alpha + 1).lgamma() + total.log()


def gamma_grid() -> tuple[Tensor, Tensor]:
    """The range that is promised, with the neighbourhood of x = alpha and both tails."""
    alpha = torch.tensor([1, 1.0001, 1.5, 2, 3.7, 7.5, 20, 50, 99.5, 133.2, 183.9, 200])
    x = torch.cat([torch.logspace(-6, 2.6, 60), torch.linspace(1, 400, 60)])[None].expand(len(alpha), -1)
    near = alpha[:, None] * torch.tensor([0.8, 0.95, 0.999, 1, 1.001, 1.05, 1.2])
    wide = torch.cat([x, near], 1)
    return alpha[:, None].expand_as(wide).contiguous().flatten(), wide.flatten()


@triton.jit  # type: ignore[untyped-decorator]
def log_cdf_kernel(alpha: tl.tensor, x: tl.tensor, out: tl.tensor, size: tl.tensor, block: tl.constexpr) -> None:
    """What `guide` uses of the gamma function, alone."""
    at = tl.program_id(0) * block + tl.arange(0, block)
    shape = tl.load(alpha + at, mask=at < size, other=1.0).to(tl.float64)
    argument = tl.load(x + at, mask=at < size, other=1.0).to(tl.float64)
    tl.store(out + at, log_cdf(shape, argument), mask=at < size)


def test_the_gamma_function_in_both_tails(
    device: torch.device, triton_runs: Callable[[], AbstractContextManager[None]]
) -> None:
    """1e-5 of P itself for shapes to 200 and arguments to 400, also where P is far below any float."""
    alpha, x = gamma_grid()
    exact = series(alpha.double(), x.double())
    alpha, x = alpha.to(device), x.to(device)
    out = torch.empty(len(alpha), dtype=torch.float64, device=device)
    with triton_runs():
        log_cdf_kernel[triton.cdiv(len(alpha), 2048),](alpha, x, out, len(alpha), block=2048)

    assert (log_gamma_cdf(alpha, x).cpu() - exact).abs().max() < 1e-6
    assert (out.cpu() - exact).abs().max() < 1e-6
    assert exact.min() < -1500


def test_closed_forms_of_the_gamma_function(device: torch.device) -> None:
    """1 - exp(-x) for shape 1; a finite sum for whole shapes; 0 at 0."""
    x = torch.tensor([1e-5, 0.1, 1, 5, 20, 70], dtype=torch.float64, device=device)
    tail = torch.stack([(-x).exp() * x**i / math.factorial(i) for i in range(6)]).sum(0)

    torch.testing.assert_close(gamma_cdf(torch.ones_like(x), x), -torch.expm1(-x), rtol=1e-6, atol=0)
    torch.testing.assert_close(gamma_cdf(torch.full_like(x, 6), x)[2:], (1 - tail)[2:], rtol=1e-6, atol=0)
    assert [0, 0] == gamma_cdf(torch.tensor([1.0, 50.0]), torch.zeros(2)).tolist()


@pytest.mark.parametrize(
    ("rows", "vocab", "dtype"),
    [
        *((5, 503, dtype) for dtype in DTYPES),
        (1, 2, torch.float32),
        (3, 640, torch.float32),
        (1, 152064, torch.float32),
    ],
    ids=str,
)
def test_every_form_computes_what_is_published(
    form: Form, rows: int, vocab: int, dtype: torch.dtype, device: torch.device
) -> None:
    """The same probabilities and the same zeros as the definition in float64."""
    logits = (torch.randn(rows, vocab, device=device) * 4).to(dtype)
    parameters = predictions(rows, vocab, device)

    result, expected = form(logits, *parameters), reference(logits, *parameters)

    assert torch.float32 == result.dtype
    assert 1e-6 > rms_ratio(result.double().exp(), expected.exp())
    # Where the definition's r underflows ours is a very small number.
    assert ((result == -INFINITY) == (expected == -INFINITY))[expected > -600].all()
    assert (result[expected == -INFINITY] < -600).all()


@pytest.mark.parametrize("form", ["native", "cpp", "public"], indirect=True)
@pytest.mark.parametrize(("rows", "vocab"), [(4097, 503), (3, 152064)])
def test_every_form_computes_it_for_many_rows_and_for_long_ones(
    form: Form, rows: int, vocab: int, device: torch.device
) -> None:
    """More than any core takes at once; in Triton's interpreter it would take minutes."""
    inputs = (torch.randn(rows, vocab, device=device) * 4, *predictions(rows, vocab, device))

    result, expected = form(*inputs), reference(*inputs)

    assert 1e-6 > rms_ratio(result.double().exp(), expected.exp())


def test_log_probabilities_follow_the_gamma_function(form: Form, device: torch.device) -> None:
    """With equal logits and no mask the result is ln P of each entry, normalised, far into the tail."""
    alpha, x = (values[None].to(device) for values in gamma_grid())
    budget = torch.tensor([1000.0], device=device)
    exact = series(alpha.double(), x.double())

    result = form(torch.zeros_like(x), alpha, (x.double() / math.log(1001)).float(), budget, masks=OPEN)

    expected = (exact - exact.logsumexp(1)).float()
    torch.testing.assert_close(result, expected, rtol=3e-7, atol=3e-5)


def test_equal_predictions_leave_the_distribution_as_it_is(form: Form, device: torch.device) -> None:
    """A factor that all tokens share cancels."""
    logits = torch.randn(3, 503, device=device) * 4
    alpha, lam = torch.full_like(logits, 70.0), torch.full_like(logits, 12.0)

    result = form(logits, alpha, lam, torch.tensor([1.0, 300.0, 1e6], device=device))

    torch.testing.assert_close(result, logits.log_softmax(1), rtol=0, atol=1e-4)


def test_a_smaller_budget_favours_tokens_that_end_sooner(form: Form, device: torch.device) -> None:
    """At one rate the mass of the k tokens with the longest modes never grows as the budget shrinks."""
    budgets = torch.tensor([2000.0, 900, 400, 150, 60, 20, 5, 1], device=device)
    logits = (torch.randn(1, 40, device=device) * 2).expand(8, -1).contiguous()
    lam = torch.full_like(logits, 12.0)
    alpha = torch.linspace(10, 120, 40, device=device).expand_as(lam).contiguous()

    mass = form(logits, alpha, lam, budgets).double().exp().flip(1).cumsum(1)[:, :-1]

    assert (mass.diff(dim=0) <= 1e-7).all()
    assert (mass[0] > mass[-1] + 1e-3).any()


def test_a_boundless_budget_leaves_only_the_masks(form: Form, device: torch.device) -> None:
    """The base distribution over the tokens whose prediction counts."""
    logits, (alpha, lam, _) = torch.randn(2, 503, device=device), predictions(2, 503, device)
    kept = (lam >= 10) & (alpha > 1) & (torch.expm1((alpha - 1) / lam) >= 0.9)

    result = form(logits, alpha, lam, torch.tensor([1e30, 1e38], device=device))

    torch.testing.assert_close(result, logits.masked_fill(~kept, -INFINITY).log_softmax(1), rtol=1e-5, atol=1e-5)
    assert 0 < kept.sum() < kept.numel()


@pytest.mark.parametrize(
    ("alpha", "lam"), [(40.0, 9.99), (1.0, 10.0), (7.0, 10.0), (math.nan, 12.0), (40.0, math.nan), (INFINITY, 12.0)]
)
def test_a_prediction_that_says_nothing_drops_its_token(
    form: Form, alpha: float, lam: float, device: torch.device
) -> None:
    """Too diffuse, without a mode, a mode below 0.9 tokens, or no number at all."""
    shapes = torch.tensor([[alpha, 40.0, 45.0]], device=device)
    rates = torch.tensor([[lam, 12.0, 12.0]], device=device)

    result = form(torch.tensor([[9.0, 1.0, 1.0]], device=device), shapes, rates, torch.tensor([80.0], device=device))

    assert [True, False, False] == result.isneginf()[0].tolist()
    assert pytest.approx(1) == result.exp().sum().item()


def test_without_any_prediction_the_likeliest_token_is_taken(form: Form, device: torch.device) -> None:
    """One-hot at the largest raw logit, for that row alone; also when all that is kept cannot be sampled."""
    logits = torch.randn(3, 503, device=device)
    logits[0, 77] = logits[1, 500] = 9
    alpha, lam = torch.full_like(logits, 70.0), torch.full_like(logits, 12.0)
    lam[0] = 5
    alpha[1, 20:] = 1
    logits[1, :20] = -INFINITY

    result = form(logits, alpha, lam, torch.full((3,), 100.0, device=device))

    assert [[77], [500]] == [row.exp().nonzero().flatten().tolist() for row in result[:2]]
    assert [0, 0] == [result[0, 77].item(), result[1, 500].item()]
    torch.testing.assert_close(result[2], logits[2].log_softmax(0), rtol=0, atol=1e-5)


def test_what_cannot_be_sampled_stays_so(form: Form, device: torch.device) -> None:
    """Raw logits of -inf keep probability 0, and the others share the mass."""
    logits = torch.randn(2, 503, device=device)
    logits[:, ::3] = -INFINITY
    alpha, lam = torch.full_like(logits, 70.0), torch.full_like(logits, 12.0)

    result = form(logits, alpha, lam, torch.tensor([3.0, 300.0], device=device))

    assert logits.isneginf().tolist() == result.isneginf().tolist()
    torch.testing.assert_close(result.exp().sum(1), torch.ones(2, device=device), rtol=0, atol=1e-5)


def test_a_hopeless_budget_still_tells_tokens_apart(form: Form, device: torch.device) -> None:
    """Where every r is below the smallest float64 the shorter prediction wins, not the larger logit."""
    alpha = torch.tensor([[500.0, 480.0, 470.0]], device=device)
    lam = torch.full_like(alpha, 12.0)
    budget = torch.ones(1, device=device)

    result = form(torch.tensor([[9.0, 0.0, 0.0]], device=device), alpha, lam, budget)

    assert (torch.special.gammainc(alpha.double(), 12 * torch.ones(1, 3).double() * math.log(2)) == 0).all()
    assert [2, 1, 0] == result.argsort(1, descending=True)[0].tolist()
    assert pytest.approx(1) == result.exp().sum().item()


def test_less_than_one_token_counts_as_one(form: Form, device: torch.device) -> None:
    """A budget that is spent, or overspent, never ends in a logarithm of nothing."""
    logits, (alpha, lam, _) = torch.randn(3, 503, device=device), predictions(3, 503, device)
    rows = [values[:1].expand(3, -1).contiguous() for values in (logits, alpha, lam)]

    result = form(*rows, torch.tensor([1.0, 0.0, -50.0], device=device))

    assert result[0].tolist() == result[1].tolist() == result[2].tolist()


def test_a_row_does_not_know_its_neighbours(form: Form, device: torch.device) -> None:
    """Each row equals its run alone, bit for bit."""
    inputs = (torch.randn(4, 503, device=device), *predictions(4, 503, device))

    together = form(*inputs)

    assert together.tolist() == [form(*(one[row : row + 1] for one in inputs))[0].tolist() for row in range(4)]


def test_rows_may_be_views_and_predictions_of_another_type(device: torch.device) -> None:
    """Logits of a padded buffer are read in place; parameters are brought to float32."""
    wide, (alpha, lam, budget) = torch.randn(3, 640, device=device), predictions(3, 503, device)
    expected = guide(wide[:, :503].contiguous(), alpha, lam, budget)

    assert expected.tolist() == guide(wide[:, :503], alpha.double(), lam.double(), budget.double()).tolist()
    assert (0, 503) == guide(wide[:0, :503], alpha[:0], lam[:0], budget[:0]).shape


def test_shapes_that_do_not_belong_together_are_refused(device: torch.device) -> None:
    """Nothing is broadcast by accident."""
    logits, (alpha, lam, budget) = torch.randn(3, 503, device=device), predictions(3, 503, device)

    for wrong in [(logits[0], alpha, lam, budget), (logits, alpha[:1], lam, budget), (logits, alpha, lam, budget[:1])]:
        with pytest.raises(ValueError, match="must be"):
            guide(*wrong)


def test_the_op_is_registered_as_pytorch_wants_it(device: torch.device) -> None:
    """Schema, fake tensors and dispatch agree."""
    inputs = (torch.randn(2, 503, device=device), *predictions(2, 503, device))

    torch.library.opcheck(module._opaque, (*inputs, *PUBLISHED))


def test_who_runs_it_where() -> None:
    """Triton on a GPU, C++ on a CPU where it was built, PyTorch elsewhere."""
    assert "triton" == provider("cuda", cpp=False)
    assert "cpp" == provider("cpu", cpp=True)
    assert ["native", "native"] == [provider("cpu", cpp=False), provider("xpu", cpp=True)]


@pytest.mark.parametrize(("capability", "element"), [(80, "*bf16"), (90, "*bf16"), (100, "*bf16"), (90, "*fp32")])
def test_the_kernel_of_scores_spills_nothing(capability: int, element: str) -> None:
    """Although the rule of 14 points is unrolled."""
    floats = ("alpha", "lam", "remaining", "out", "sums")
    masks = dict.fromkeys(("lam_min", "alpha_min", "log_mode_min"), "fp32")
    signature = {"logits": element, "stride": "i64", "vocab": "i32", "best": "*i32"} | masks
    signature |= dict.fromkeys(floats, "*fp32")

    assert 0 == compile_ahead(score_kernel, signature, {"block": module.BLOCK}, capability, warps=module.WARPS).spills


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_kernel_that_normalises_spills_nothing(capability: int) -> None:
    """With the parts of the largest vocabulary."""
    signature = {"out": "*fp32", "sums": "*fp32", "best": "*i32", "vocab": "i32", "parts": "i32"}
    constants = {"wide": 512, "block": 4 * module.BLOCK}

    assert 0 == compile_ahead(normalise_kernel, signature, constants, capability).spills
