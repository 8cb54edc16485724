"""A frozen linear layer in fp8 against the plain one: values, gradients, rows, compilation."""

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

from vltrain.models import fp8_linear
from vltrain.models.fp8_linear import E4M3, Fp8Linear, rounded_rows

M, K, N = 24, 64, 96
# Three bits of mantissa: to the nearest, a number moves by 2^-4 of itself at most. Numbers below
# the least normal one, 2^-6, move by 2^-10; the largest of a row is then at least 224.
STEP = 2.0**-4
LEAST = 2.0**-10 / 224


@pytest.fixture
def plain() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(K, N).requires_grad_(False)


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, M // 2, K, requires_grad=True)


def in_fp8(layer: nn.Linear) -> Fp8Linear:
    return Fp8Linear(layer.weight, layer.bias)


def rounding(rows: Tensor) -> Tensor:
    """The most that each number of rows may have moved by."""
    return STEP * rows.abs() + LEAST * rows.abs().amax(-1, keepdim=True)


def most_apart(rows: Tensor, columns: Tensor) -> Tensor:
    """How far rows @ columns.t() may be from itself in e4m3."""
    of_rows, of_columns = rounding(rows), rounding(columns)
    moved = of_rows @ columns.abs().t() + rows.abs() @ of_columns.t() + of_rows @ of_columns.t()
    return moved + 1e-5  # float32 sums


def apart(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).float().norm() / wanted.float().norm()).item()


def test_the_output_is_the_plain_ones_within_what_three_bits_of_mantissa_lose(plain, x):
    found, wanted = in_fp8(plain)(x), plain(x)

    assert ((found - wanted).abs() <= most_apart(x, plain.weight)).all()
    assert 0.005 < apart(found, wanted) < 0.05


def test_the_gradient_of_the_input_is_the_plain_ones_within_the_same(plain, x):
    gradient = torch.randn(2, M // 2, N)
    found, wanted = (
        torch.autograd.grad(layer(x), x, gradient)[0] for layer in (in_fp8(plain), plain)
    )

    # weights are rounded by the scales of outputs, which here are columns
    moved = rounding(plain.weight)
    of_rows = STEP * gradient.abs() + 2 * LEAST * gradient.abs().amax(-1, keepdim=True)
    bound = gradient.abs() @ moved + of_rows @ (plain.weight.abs() + moved)
    assert ((found - wanted).abs() <= bound * 1.01 + 1e-5).all()
    assert 0.005 < apart(found, wanted) < 0.05


def test_both_ways_go_through_the_very_same_weight(plain, x):
    layer = in_fp8(plain)
    one = torch.eye(N)  # each gradient is one number, which e4m3 has
    rows = torch.zeros(N, K, requires_grad=True)

    found = torch.autograd.grad(layer(rows), rows, one)[0]

    assert torch.equal(found, layer.weight)
    assert not torch.equal(layer.weight, plain.weight)


def test_an_output_with_large_weights_leaves_the_others_as_they_are(plain, x):
    before = in_fp8(plain)(x)
    plain.weight[5] *= 1000

    after = in_fp8(plain)(x)

    others = torch.arange(N) != 5
    assert torch.equal(after[..., others], before[..., others])
    assert apart(after[..., 5], plain(x)[..., 5]) < 0.1


def test_a_token_with_large_numbers_leaves_the_others_as_they_are(plain, x):
    layer = in_fp8(plain)
    before = layer(x)
    louder = x.detach().clone()
    louder[0, 3] *= 1000

    after = layer(louder)

    assert torch.equal(after[1], before[1])
    assert torch.equal(after[0, :3], before[0, :3])
    assert apart(after[0, 3], plain(louder)[0, 3]) < 0.1


def test_scales_are_powers_of_two_under_which_the_largest_number_fits():
    rows = torch.tensor([[448.0, 1.0], [449.0, 1.0], [-0.001, 0.0], [3e38, 0.0]])

    codes, scales = rounded_rows(rows)

    assert scales.flatten().tolist() == [1.0, 2.0, 2.0**-18, 2.0**120]
    assert codes.dtype == E4M3
    assert codes.float()[:2].tolist() == [[448.0, 1.0], [224.0, 0.5]]
    assert torch.finfo(E4M3).max == 448


@pytest.mark.parametrize("small", [0.0, 1e-38, 1e-30])
def test_tokens_without_numbers_to_speak_of_give_no_nan(plain, x, small):
    layer = in_fp8(plain)
    quiet = torch.full_like(x, small, requires_grad=True)

    out = layer(quiet)
    gradient = torch.autograd.grad(out, quiet, torch.full_like(out, small))[0]

    torch.testing.assert_close(out, plain.bias.expand_as(out))
    assert gradient.abs().max() <= 1e-28
    assert not gradient.isnan().any()


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
def test_a_token_that_is_not_finite_stays_so_and_is_alone_in_it(plain, x, broken):
    damaged = x.detach().clone()
    damaged[1, 2, 7] = broken

    out = in_fp8(plain)(damaged)

    assert not out[1, 2].isfinite().any()
    assert out[0].isfinite().all()


@pytest.mark.parametrize("shape", [(K,), (5, K), (2, 3, 4, K), (0, K)])
def test_any_leading_dimensions_will_do(plain, shape):
    x = torch.ones(shape, requires_grad=True)

    out = in_fp8(plain)(x)

    assert out.shape == (*shape[:-1], N)
    assert torch.autograd.grad(out.sum(), x)[0].shape == shape


def test_a_layer_without_bias_adds_none(x):
    layer = nn.Linear(K, N, bias=False)

    assert in_fp8(layer)(torch.zeros(1, K)).eq(0).all()


def test_nothing_of_the_layer_learns(plain, x):
    layer = in_fp8(plain)
    layer(x).sum().backward()

    assert x.grad.any()
    assert all(p.grad is None and not p.requires_grad for p in layer.parameters())


def test_it_takes_the_bytes_of_bf16_and_a_scale_for_each_output():
    layer = Fp8Linear(torch.randn(N, K), None)

    assert sum(p.nbytes for p in layer.parameters()) == 2 * N * K + 4 * N


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_a_model_that_is_cast_keeps_the_codes_and_what_they_stand_for(x, narrow):
    layer = Fp8Linear(torch.randn(N, K), None)
    expected = layer(x)

    layer.to(narrow)

    assert torch.equal(layer(x), expected)


def test_under_autocast_it_gives_what_autocast_computes_in_and_the_inputs_gradient(plain, x):
    with torch.autocast("cpu", torch.bfloat16):
        out = in_fp8(plain)(x)

    assert out.dtype == torch.bfloat16
    assert torch.autograd.grad(out.float().sum(), x)[0].dtype == torch.float32
    assert apart(out, plain(x)) < 0.05


def strict_kernel(rows: Tensor, columns: Tensor, **how) -> Tensor:
    """`torch._scaled_mm` as GPUs have it: what they refuse is refused on a CPU as well."""
    for matrix, along in ((rows, 1), (columns, 0)):
        assert matrix.dtype == E4M3
        assert matrix.dim() == 2
        assert matrix.stride(along) == 1
        assert matrix.stride(1 - along) == matrix.size(along)
        assert matrix.size(along) % 16 == 0
    assert columns.size(1) % 16 == 0
    assert how.keys() == {"scale_a", "scale_b", "out_dtype", "use_fast_accum"}
    assert how["scale_a"].shape == (rows.size(0), 1)
    assert how["scale_b"].shape == (1, columns.size(1))
    for name in ("scale_a", "scale_b"):
        assert how[name].dtype == torch.float32
        assert how[name].is_contiguous()
    assert how["out_dtype"] == torch.bfloat16
    return SCALED_MM(rows, columns, **how)


SCALED_MM = torch._scaled_mm


@pytest.mark.parametrize("turned", [False, True])
def test_the_kernel_gets_what_it_takes_and_gives_what_is_emulated(monkeypatch, plain, x, turned):
    layer = in_fp8(plain).bfloat16()
    x = x.detach().bfloat16()
    x = (x.mT.contiguous().mT if turned else x).requires_grad_()
    gradient = torch.randn(2, 1, N).bfloat16().expand(2, M // 2, N)  # not in one piece of memory
    out = layer(x)
    wanted = (out, torch.autograd.grad(out, x, gradient)[0])
    monkeypatch.setattr(fp8_linear, "kernel_serves", lambda rows: True)
    monkeypatch.setattr(torch, "_scaled_mm", strict_kernel)

    out = layer(x)
    found = (out, torch.autograd.grad(out, x, gradient)[0])

    torch.testing.assert_close(found, wanted, rtol=2**-7, atol=0.01)


def gated(layer: Fp8Linear, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return F.silu(layer(x)) * 2


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_it_compiles_in_one_graph_for_all_lengths(compilations, plain, backend):
    layer = in_fp8(plain)
    compiled = torch.compile(gated, backend=backend, fullgraph=True, dynamic=True)
    for length in (12, 7, 30):
        x = torch.randn(2, length, K, requires_grad=True)
        (out, gradient), (wanted, wanted_gradient) = (
            (out, torch.autograd.grad(out.float().square().sum(), x)[0])
            for out in (compiled(layer, x), gated(layer, x))
        )
        assert apart(out, wanted) < 0.01
        assert apart(gradient, wanted_gradient) < 0.03

    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 17, 2048])
def test_a_gpus_kernel_gives_what_is_emulated(tokens):
    torch.manual_seed(0)
    layer = Fp8Linear(torch.randn(11008, 4096) * 0.02, None).cuda()
    x = torch.randn(tokens, 4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    gradient = torch.randn(tokens, 11008, device="cuda", dtype=torch.bfloat16)
    found = layer(x)
    found = (found, torch.autograd.grad(found, x, gradient)[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fp8_linear, "kernel_serves", lambda rows: False)
        wanted = layer(x)
        wanted = (wanted, torch.autograd.grad(wanted, x, gradient)[0])

    assert apart(found[0], wanted[0]) < 0.02
    assert apart(found[1], wanted[1]) < 0.01
