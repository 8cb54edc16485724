"""Adapters' dropout in compiled layers: what is dropped, and that both ways drop the same."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from vltrain.models.dropout import (
    HashedDropout,
    draw_seeds,
    forget_seeds,
    hash_dropouts,
    hashes,
)

CPU = torch.device("cpu")


def seeded(p: float) -> HashedDropout:
    dropout = HashedDropout(p)
    draw_seeds([dropout], CPU)
    return dropout


def dropped(p: float, *shape: int) -> Tensor:
    """bool: which of so many values are dropped."""
    return seeded(p)(torch.ones(shape)) == 0


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_the_share_that_is_dropped_is_p_and_the_rest_makes_up_for_it(p: float):
    torch.manual_seed(0)
    out = seeded(p)(torch.ones(1, 1000, 1000))

    sigma = (p * (1 - p) / out.numel()) ** 0.5
    assert abs((out == 0).float().mean().item() - p) < 4 * sigma
    assert set(out.unique().tolist()) == {0.0, torch.tensor(1 / (1 - p)).item()}


def test_what_is_dropped_is_even_over_rows_and_columns_and_no_value_knows_of_its_neighbours():
    torch.manual_seed(0)
    mask = dropped(0.5, 1024, 1024).float() - 0.5

    for side in (0, 1):
        assert mask.mean(side).abs().max() < 5 * 0.5 / 32  # five sigma of the mean of 1,024
        for distance in (1, 2, 16, 512):
            together = (mask * mask.roll(distance, side)).mean().item()
            assert abs(together) < 5 * 0.25 / 1024


def test_calls_and_adapters_drop_independently():
    torch.manual_seed(0)
    one, other = HashedDropout(0.5), HashedDropout(0.5)
    masks = []
    for _ in range(2):
        draw_seeds([one, other], CPU)
        masks += [(d(torch.ones(512, 512)) == 0).float() - 0.5 for d in (one, other)]

    for first in range(4):
        for second in range(first):
            assert abs((masks[first] * masks[second]).mean().item()) < 5 * 0.25 / 512


def test_the_generator_of_torch_says_what_is_dropped():
    torch.manual_seed(3)
    before = dropped(0.5, 64, 64)
    torch.manual_seed(3)

    assert torch.equal(dropped(0.5, 64, 64), before)


def test_a_hash_of_a_place_is_that_of_its_number_in_order():
    seeds = torch.tensor([5, -7], dtype=torch.int32)

    long = hashes(torch.empty(1, 6, 8), seeds)
    flat = hashes(torch.empty(48), seeds)
    assert torch.equal(long.flatten(), flat)
    assert long.dtype == torch.int32
    assert (long >= 0).all()
    assert len(flat.unique()) == 48


def test_without_seeds_or_in_evaluation_it_is_torchs_own():
    x = torch.randn(32, 32)
    dropout = HashedDropout(0.3)
    torch.manual_seed(0)
    plain = nn.functional.dropout(x, 0.3)

    torch.manual_seed(0)
    assert torch.equal(dropout(x), plain)
    draw_seeds([dropout], CPU)
    assert torch.equal(dropout.eval()(x), x)
    forget_seeds([dropout.train()])
    torch.manual_seed(0)
    assert torch.equal(dropout(x), plain)


def test_the_gradient_passes_where_the_value_did():
    x = torch.randn(16, 16, requires_grad=True)
    torch.manual_seed(0)
    out = seeded(0.5)(x)
    out.sum().backward()

    assert torch.equal(x.grad, torch.where(out == 0, 0.0, 2.0))


def test_all_dropouts_of_adapters_are_replaced_once_and_those_without_are_left():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.Dropout(0.5)})
    inject_adapter_in_model(LoraConfig(target_modules=["a"], lora_dropout=0.2), model, "one")
    inject_adapter_in_model(LoraConfig(target_modules=["b"], lora_dropout=0.0), model, "two")

    hashed = hash_dropouts(model)

    assert [d.p for d in hashed] == [0.2]
    assert hash_dropouts(model) == hashed
    assert type(model["c"]) is nn.Dropout
    assert "seeds" not in "".join(model.state_dict())
