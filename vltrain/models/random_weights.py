"""Models of random weights, for what only their size decides: time and memory."""

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from vltrain.models.census import skeleton
from vltrain.models.family import Family
from vltrain.models.quantization import Nf4, pack_layers


def random_in_nf4(
    family: Family,
    config: PreTrainedConfig,
    nf4: Nf4,
    dtype: torch.dtype,
    device: torch.device,
) -> PreTrainedModel:
    """A family's model with linear layers in NF4, on a device where it never lies whole.

    Args:
        nf4: which layers get 4 bits.
        dtype: of all other weights, and that quantized layers compute in.
        device: which holds one weight in `dtype` at a time, beside what is done.
    """
    model = skeleton(family, config, dtype)
    std = getattr(config, "initializer_range", 0.02)

    def made(weight: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(weight, device=device).normal_(std=std)

    packed = pack_layers(model, family, nf4, dtype, made)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                filled = torch.zeros_like(parameter, device=device)
                setattr(module, name, nn.Parameter(filled, parameter.requires_grad))
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.zeros_like(buffer, device=device)
        if module not in packed:  # whose biases stay zeros
            model._init_weights(module)
    model.tie_weights()
    return model
