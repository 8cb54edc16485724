"""What the host does between the steps of a run, while a GPU waits for it.

`transformers` puts the model into training mode and forgets its gradients in every step. Both go
through thousands of modules, most of them frozen ones, which takes milliseconds each.
"""

from types import MethodType

import torch
from torch import nn


def shorten_steps(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Let `model.train()` and `model.zero_grad()` touch only what they change, in place.

    A model that is in training mode already is left as it is: here all modules in it are put into
    the mode of the whole, which a base that was read from a folder is not in under its adapters.

    Args:
        model: not wrapped by an engine.
        optimizer: of all in it that takes a gradient; of no parameters that peft has replaced
            since, as it does where it reads a checkpoint.
    """
    type(model).train(model, model.training)
    model.learns_in_steps = learned_by(optimizer)
    model.train = MethodType(_train, model)
    model.zero_grad = MethodType(_zero_grad, model)


def learned_by(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """All that an optimizer moves: without a walk through the model, most of which is frozen."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _train(model: nn.Module, mode: bool = True) -> nn.Module:
    return model if model.training == mode else type(model).train(model, mode)


def _zero_grad(model: nn.Module, set_to_none: bool = True) -> None:
    if not set_to_none:
        type(model).zero_grad(model, set_to_none)
        return
    for parameter in model.learns_in_steps:
        parameter.grad = None
