"""A learning rate for each part of a model, and a faster one for the second half of adapters."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from vltrain.config import LearningRates
from vltrain.models.adapters import published_name
from vltrain.models.family import Family

SECOND_HALF = ".lora_B."


def rate_of(
    family: Family, rates: LearningRates, *, default: float, plus: float | None
) -> Callable[[str], float] | None:
    """What each parameter, by its name, learns at; None where all learn at `default`.

    Args:
        family: names the parts.
        rates: of single parts. An adapter belongs to the part that it sits on.
        default: of the other parts.
        plus: how many times faster the second matrix of an adapter learns (LoRA+).
    """
    if plus is None and rates == LearningRates():
        return None

    def rate(name: str) -> float:
        base = getattr(rates, family.parts.of(published_name(name))) or default
        return base * plus if plus is not None and SECOND_HALF in name else base

    return rate


def split_groups(
    optimizer: torch.optim.Optimizer, model: nn.Module, rate: Callable[[str], float]
) -> None:
    """Part an optimizer's groups by learning rate, before its first step and its schedule.

    The group at the optimizer's own rate comes first: its rate is what a run logs.
    """
    rates = {parameter: rate(name) for name, parameter in model.named_parameters()}
    default = optimizer.defaults.get("lr")
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        for own in sorted({rates[parameter] for parameter in group["params"]}):
            members = [parameter for parameter in group["params"] if rates[parameter] == own]
            groups.append({**group, "params": members, "lr": own})
    optimizer.param_groups = sorted(groups, key=lambda group: group["lr"] != default)
