"""GPTQ of one weight against the formulas of the paper, and what is stored of it."""

import pytest
import torch
from tiny import write_gptq
from torch import Tensor

from vltrain.models.gptq import unpacked_weight
from vltrain.models.gptq_solver import (
    DAMP,
    Codes,
    InputMoments,
    output_error,
    round_to_nearest,
    scales_of,
    solve,
)


def correlated(tokens: int, inputs: int, seed: int = 0) -> Tensor:
    """Inputs that lie near to a space of a quarter of their dimensions."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs // 4, inputs, generator=generator)
    noise = torch.randn(tokens, inputs, generator=generator)
    return torch.randn(tokens, inputs // 4, generator=generator) @ mixing + 0.3 * noise


def moments_of(x: Tensor) -> Tensor:
    moments = InputMoments(x.size(1), x.device)
    moments.add(x[: len(x) // 2][None])
    moments.add(x[len(x) // 2 :])
    return moments.mean()


def weight_of(outputs: int, inputs: int) -> Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(9)) * 0.02


def by_the_paper(weight: Tensor, moments: Tensor, group_size: int) -> Tensor:
    """One weight of each row after the other, the inverse of what is left made anew each time."""
    left = weight.double().clone()
    damped = moments.double() + DAMP * moments.diagonal().mean() * torch.eye(len(moments))
    codes = torch.zeros(left.shape, dtype=torch.uint8)
    for place in range(left.size(1)):
        if place % group_size == 0:
            scales = scales_of(left[:, place : place + group_size].float()).double()
        inverse = torch.linalg.inv(damped[place:, place:])
        rounded = (left[:, place, None] / scales).round().clamp(-8, 7)
        codes[:, place] = (rounded[:, 0] + 8).to(torch.uint8)
        error = (left[:, place, None] - rounded * scales) / inverse[0, 0]
        left[:, place:] -= error * inverse[0]
    return codes


def test_moments_are_the_mean_of_the_products_of_inputs():
    x = correlated(40, 8)

    torch.testing.assert_close(moments_of(x), x.T @ x / 40)


def test_codes_are_those_of_the_paper():
    weight, moments = weight_of(6, 64), moments_of(correlated(400, 64))

    solved = solve(weight, moments, group_size=16)

    assert solved.scales.shape == (6, 4)
    assert solved.codes.tolist() == by_the_paper(weight, moments, 16).tolist()


def test_outputs_are_nearer_than_those_of_each_weight_rounded_by_itself():
    x = correlated(2000, 256)
    weight = weight_of(64, 256)

    def lost(codes: Codes) -> float:
        return float((x @ (weight - codes.weight()).T).norm() / (x @ weight.T).norm())

    solved, rounded = solve(weight, moments_of(x)), round_to_nearest(weight)

    assert lost(solved) < 0.5 * lost(rounded)
    assert output_error(weight, solved.weight(), moments_of(x)) == pytest.approx(lost(solved), 1e-3)


def test_inputs_that_have_nothing_in_common_leave_rounding_as_it_is():
    weight = weight_of(8, 128)

    solved, rounded = solve(weight, torch.eye(128)), round_to_nearest(weight)

    assert solved.codes.tolist() == rounded.codes.tolist()
    assert solved.scales.tolist() == rounded.scales.tolist()


def test_rounding_is_within_half_a_step_but_for_the_largest_weight():
    weight = weight_of(8, 128)
    kept = round_to_nearest(weight)

    lost = (weight - kept.weight()).abs() / kept.scales.float()

    assert (lost > 0.501).sum(1).max() <= 1  # 7.5 steps are the largest, and codes end at 7
    assert lost.max() < 0.6


def test_an_input_that_is_always_zero_does_no_harm():
    x = correlated(400, 128)
    x[:, 5] = 0
    weight = weight_of(8, 128)

    solved = solve(weight, moments_of(x))

    assert (solved.weight()[:, 5] == 0).all()
    assert solved.scales.isfinite().all()


def test_a_row_of_zeros_stays_one():
    weight = weight_of(8, 128)
    weight[3] = 0

    assert (solve(weight, moments_of(correlated(400, 128))).weight()[3] == 0).all()


def test_fewer_tokens_than_inputs_suffice():
    weight, x = weight_of(8, 128), correlated(10, 128)

    solved = solve(weight, moments_of(x))

    moments = moments_of(x)
    assert output_error(weight, solved.weight(), moments) < output_error(
        weight, round_to_nearest(weight).weight(), moments
    )


def test_inputs_that_are_not_finite_are_refused():
    moments = InputMoments(8, torch.device("cpu"))
    moments.add(torch.full((1, 8), torch.nan))

    with pytest.raises(ValueError, match="NaN or infinite"):
        moments.mean()


def test_the_tensors_are_those_of_the_published_layout(tmp_path):
    from safetensors.torch import load_file

    write_gptq(tmp_path)
    published = load_file(tmp_path / "model.safetensors")
    layer = "transformer.h.0.mlp.c_proj"
    weight = weight_of(128, 128)

    stored = round_to_nearest(weight).tensors(torch.zeros(128))

    for name, tensor in stored.items():
        assert tensor.dtype is published[f"{layer}.{name}"].dtype
        assert tensor.shape == published[f"{layer}.{name}"].shape
    assert stored["qzeros"].equal(published[f"{layer}.qzeros"])
    assert stored["g_idx"].equal(published[f"{layer}.g_idx"])


def test_the_tensors_stand_for_the_weight():
    solved = solve(weight_of(16, 256), moments_of(correlated(600, 256)))
    stored = solved.tensors(torch.zeros(16))

    names = ("qweight", "qzeros", "scales", "g_idx")

    assert unpacked_weight(*(stored[name] for name in names)).equal(solved.weight())
