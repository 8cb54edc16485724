"""What optimizers keep, by their names."""

import pytest
import torch
from transformers.training_args import OptimizerNames

from vltrain.models.sizes import AdapterSizes, Census, PlaceWeights
from vltrain.training.optimizer_bytes import Optimizer

COUNT = 25_600
CENSUS = Census({"layers": PlaceWeights(COUNT, COUNT, COUNT, 4 * COUNT, 4 * COUNT)}, AdapterSizes())


@pytest.mark.parametrize(
    ("name", "each"),
    [
        ("adamw_torch", 8),
        ("adamw_torch_fused", 8),
        ("paged_adamw_32bit", 8),
        ("adamw_bnb_8bit", 2 * (1 + 4 / 256)),
        ("adamw_8bit", 2 * (1 + 4 / 256)),
        ("paged_adamw_8bit", 2 * (1 + 4 / 256)),
        ("adamw_torch_4bit", 2 * (0.5 + 4 / 128)),
        ("ademamix", 12),
        ("lion_32bit", 4),
        ("lion_8bit", 1 + 4 / 256),
        ("rmsprop", 4),
        ("adagrad", 4),
        ("sgd", 0),
    ],
)
def test_the_states_of_a_float32_weight(name, each):
    assert Optimizer(name).states(CENSUS) == COUNT * each


def test_what_rounding_takes_is_kept_in_two_bytes():
    plain, residual = Optimizer("adamw_8bit"), Optimizer("adamw_8bit", residual=True)

    assert residual.states(CENSUS) - plain.states(CENSUS) == 2 * COUNT


def test_a_weight_in_bfloat16_has_a_master_and_two_moments_in_float32():
    halves = Census(
        {"adapter": PlaceWeights(COUNT, COUNT, COUNT, 2 * COUNT, 2 * COUNT)}, AdapterSizes()
    )

    assert Optimizer("adamw_torch_fused", masters=True).states(halves) == 12 * COUNT


def test_an_unknown_optimizer_is_counted_as_adamw_and_says_so():
    unknown = Optimizer("lomo")

    assert not unknown.known
    assert unknown.states(CENSUS) == 8 * COUNT


def test_optimizers_whose_states_page_are_told_by_their_names():
    paged = {str(name.value) for name in OptimizerNames if Optimizer(str(name.value)).paged}

    assert paged == {
        "paged_adamw_32bit",
        "paged_adamw_8bit",
        "paged_ademamix_32bit",
        "paged_ademamix_8bit",
        "paged_lion_32bit",
        "paged_lion_8bit",
    }


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("adamw_torch", torch.optim.AdamW),
        ("sgd", torch.optim.SGD),
        ("adagrad", torch.optim.Adagrad),
        ("rmsprop", torch.optim.RMSprop),
    ],
)
def test_torch_allocates_what_is_counted(name, make):
    weight = torch.nn.Parameter(torch.ones(COUNT))
    optimizer = make([weight], lr=0.1)
    weight.grad = torch.ones(COUNT)
    optimizer.step()

    held = [value for value in optimizer.state[weight].values() if value.numel() > 1]
    assert sum(v.numel() * v.element_size() for v in held) == Optimizer(name).states(CENSUS)
