"""What a step does with the model beside learning: the same as ever, and no walk through it."""

import copy

import pytest
import torch
from torch import nn

from vltrain.training.host_time import shorten_steps


@pytest.fixture
def model() -> nn.Module:
    """Of two layers the second learns."""
    model = nn.Sequential(nn.Linear(2, 2).requires_grad_(requires_grad=False), nn.Linear(2, 1))
    shorten_steps(model, torch.optim.SGD(model[1].parameters()))
    return model


def test_modes_reach_every_module_where_they_change(model):
    assert model.eval() is model
    assert not any(module.training for module in model.modules())
    assert model.train() is model
    assert all(module.training for module in model.modules())


def test_what_is_in_evaluation_mode_within_a_model_that_trains_is_put_into_its_mode():
    read = nn.Sequential(nn.Linear(2, 2), nn.Dropout()).eval()
    model = nn.Sequential(read, nn.Linear(2, 1))

    shorten_steps(model, torch.optim.SGD(model.parameters()))
    model.train()

    assert all(module.training for module in model.modules())


def test_a_model_in_training_mode_is_not_walked_through(model, monkeypatch):
    monkeypatch.setattr(nn.Linear, "train", None)  # whoever calls it fails

    assert model.train() is model


def test_gradients_of_what_learns_are_forgotten(model):
    model(torch.ones(1, 2)).sum().backward()
    assert model[1].weight.grad is not None

    model.zero_grad()
    assert [parameter.grad for parameter in model.parameters()] == [None] * 4


def test_gradients_are_set_to_zero_where_that_is_asked_for(model):
    model(torch.ones(1, 2)).sum().backward()

    model.zero_grad(set_to_none=False)
    assert torch.equal(model[1].weight.grad, torch.zeros(1, 2))


def test_a_copy_of_the_model_answers_for_itself(model):
    model(torch.ones(1, 2)).sum().backward()
    other = copy.deepcopy(model)
    other[1].weight.grad = torch.ones(1, 2)
    other.eval()
    other.zero_grad()

    assert model.training
    assert not other[1].training
    assert model[1].weight.grad is not None
    assert other[1].weight.grad is None
