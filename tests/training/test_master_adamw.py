"""AdamW on float32 masters of bfloat16 weights."""

import pytest
import torch
from torch import Tensor, nn

from vltrain.training import master_adamw
from vltrain.training.master_adamw import MasterAdamW, masters_of, narrow_learned

SETTINGS = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def weights(dtype: torch.dtype = torch.bfloat16) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [
        nn.Parameter(torch.randn(shape).bfloat16().to(dtype)) for shape in ((7, 5), (3,), (4, 4))
    ]


def learn(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], *steps: int) -> None:
    """Steps by gradients that follow from the number of the step alone."""
    for number in steps:
        torch.manual_seed(number)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape).bfloat16().to(parameter.dtype)
        optimizer.step()


def masters(optimizer: MasterAdamW, parameters: list[nn.Parameter]) -> list[Tensor]:
    return [optimizer.master(parameter) for parameter in parameters]


@pytest.mark.parametrize("chunk", [2**26, 16, 4])
def test_masters_learn_as_float32_does_and_weights_are_what_they_round_to(monkeypatch, chunk):
    monkeypatch.setattr(master_adamw, "CHUNK", chunk)
    ours, plain = weights(), weights(torch.float32)
    optimizer = MasterAdamW(ours, **SETTINGS)

    learn(optimizer, ours, 1, 2, 3)
    learn(torch.optim.AdamW(plain, **SETTINGS), plain, 1, 2, 3)

    torch.testing.assert_close(masters(optimizer, ours), [p.data for p in plain])
    assert all(torch.equal(p.data, optimizer.master(p).bfloat16()) for p in ours)


def test_steps_too_small_for_a_bfloat16_add_up():
    (weight,) = parameters = [nn.Parameter(torch.ones(4, dtype=torch.bfloat16))]
    optimizer = MasterAdamW(parameters, lr=1e-4)

    for _ in range(100):
        weight.grad = torch.ones_like(weight)
        optimizer.step()

    assert weight.data.tolist() == pytest.approx([0.99] * 4, abs=2e-3)


def test_a_state_that_is_saved_and_loaded_goes_on_to_the_bit(tmp_path):
    ours, others = weights(), weights()
    optimizer, other = MasterAdamW(ours, **SETTINGS), MasterAdamW(others, **SETTINGS)
    learn(optimizer, ours, 1, 2)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")

    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    learn(optimizer, ours, 3)
    learn(other, others, 3)

    assert all(map(torch.equal, masters(optimizer, ours), masters(other, others)))


def test_a_weight_without_a_gradient_is_left_alone():
    first, second, _ = parameters = weights()
    before = second.data.clone()
    optimizer = MasterAdamW(parameters, **SETTINGS)
    first.grad = torch.ones_like(first)

    optimizer.step()

    assert torch.equal(second.data, before)
    assert optimizer.master(second) is None


def test_what_learns_is_saved_as_its_masters_and_what_has_none_as_it_is():
    model = nn.Linear(3, 3)
    model.bias.requires_grad_(False)
    narrow_learned(model)
    optimizer = MasterAdamW([model.weight], **SETTINGS)
    assert torch.equal(masters_of(model, optimizer)["weight"], model.weight.data.float())
    learn(optimizer, [model.weight], 1)

    found = masters_of(model, optimizer)

    assert found.keys() == {"weight"}
    assert found["weight"] is optimizer.master(model.weight)
    assert model.bias.dtype == torch.float32
    assert masters_of(model, torch.optim.SGD(model.parameters(), lr=1.0)) == {}
