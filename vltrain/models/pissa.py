"""Adapters that begin at a base's main directions (PiSSA, arXiv:2404.02948), saved as plain LoRA.

Such an adapter starts with the largest singular values of each weight and leaves the rest in the
base: W = R + B0 A0. What it learns is saved against the base as it was,
R + B A = W + [B, -B0] [A, A0], an ordinary adapter of twice the rank.
"""

from collections.abc import Mapping

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor

FIRST, SECOND = ".lora_A.", ".lora_B."


def first_weights(model: PeftModel) -> dict[str, Tensor]:
    """The adapters' weights before they learn, on the CPU, by name."""
    return {
        name: parameter.detach().cpu().clone()
        for name, parameter in model.named_parameters()
        if FIRST in name or SECOND in name
    }


def against_base(tensors: Mapping[str, Tensor], first: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What has been learned as an adapter of twice the rank, beside the base as it was.

    Args:
        tensors: what has learned: adapters [r, in] and [out, r], and whole modules, left alone.
        first: the adapters' weights at the start.
    """
    plain = {}
    for name, tensor in tensors.items():
        if FIRST in name:
            tensor = torch.cat([tensor.cpu(), first[name]], dim=0)
        elif SECOND in name:
            tensor = torch.cat([tensor.cpu(), -first[name]], dim=1)
        plain[name] = tensor
    return plain


def double_rank(config: LoraConfig) -> None:
    """Make an adapter's shape that of `against_base`, with the scale that it had."""
    config.r *= 2
    config.lora_alpha *= 2
    config.init_lora_weights = True
