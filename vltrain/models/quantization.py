"""Weights of 4 bits under an adapter, and how many weights packed ones and fp8 stand for."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from vltrain.models.family import Family, has_prefix
from vltrain.models.fp8_linear import Fp8Linear
from vltrain.models.shares import element_count


@dataclass(frozen=True)
class Nf4:
    """NF4 with double quantization (arXiv:2305.14314), made while a checkpoint is read."""

    vision: bool = False  # whether the linear layers of the vision tower get it too


def nf4_config(family: Family, nf4: Nf4, dtype: torch.dtype) -> BitsAndBytesConfig:
    """What `from_pretrained` needs to quantize each linear layer as it is read.

    Args:
        family: names the parts.
        nf4: which of them are quantized.
        dtype: that quantized layers compute in, and of all other weights.
    """
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=[re.escape(name) for name in kept_modules(family, nf4)],
    )


def kept_modules(family: Family, nf4: Nf4) -> tuple[str, ...]:
    """The modules that keep 16 bits: embeddings, projector and, unless asked, the vision tower.

    The projector is a hundredth of the model, and most of its attention's weights are in no
    linear layer.
    """
    vision = () if nf4.vision else family.parts.vision
    return (*family.embeddings, *family.parts.projector, *vision)


def packed_names(model: nn.Module, family: Family, nf4: Nf4) -> list[str]:
    """The linear layers that get 4 bits."""
    kept = kept_modules(family, nf4)
    return [
        name
        for name, layer in model.named_modules()
        if type(layer) is nn.Linear and not any(has_prefix(name, module) for module in kept)
    ]


def pack_skeleton(model: nn.Module, family: Family, nf4: Nf4) -> None:
    """Give the layers of a model without memory the bytes that they will have in 4 bits.

    A weight takes half a byte, and 64 of them a scale of one.
    """
    for name in packed_names(model, family, nf4):
        layer = model.get_submodule(name)
        count = layer.weight.numel()
        packed = torch.empty(count // 2 + count // 64, dtype=torch.uint8, device="meta")
        layer.weight = nn.Parameter(packed, requires_grad=False)


def pack_layers(
    model: nn.Module,
    family: Family,
    nf4: Nf4,
    dtype: torch.dtype,
    weight_of: Callable[[torch.Tensor], torch.Tensor],
) -> set[nn.Module]:
    """Put layers in NF4 into the place of a model's linear ones, as `nf4_config` has them read.

    Args:
        dtype: that they compute in.
        weight_of: the weight of a layer, given the one that is there: itself, or one that is made
            on another device.

    Returns:
        The layers.
    """
    from bitsandbytes.nn import Linear4bit, Params4bit

    settings: dict[str, Any] = {"compress_statistics": True, "quant_type": "nf4"}
    made: set[nn.Module] = set()
    for name in packed_names(model, family, nf4):
        layer = model.get_submodule(name)
        with torch.device("meta"):
            packed = Linear4bit(
                layer.in_features, layer.out_features, compute_dtype=dtype, **settings
            )
        weight = weight_of(layer.weight.data)
        held = Params4bit(weight, requires_grad=False, module=packed, **settings)
        packed.weight, packed.bias = held.to(weight.device), layer.bias
        made.add(packed)
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, packed)
    model.is_loaded_in_4bit = True  # by which peft knows what to put its adapters on
    return made


def dequantized_nf4(weight: torch.Tensor) -> torch.Tensor:
    """What is left of a weight once it has been quantized as `nf4_config` does it.

    Returns:
        Of the same shape and dtype; a model in NF4 computes with exactly these numbers.
    """
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Params4bit

    held = Params4bit(
        weight.contiguous(), requires_grad=False, compress_statistics=True, quant_type="nf4"
    ).to(weight.device)
    return dequantize_4bit(held.data, held.quant_state).to(weight.dtype)


def weight_count(parameter: nn.Parameter) -> int:
    """How many weights a parameter stands for; a packed one holds several in each element."""
    state = getattr(parameter, "quant_state", None)
    return element_count(parameter) if state is None else state.shape.numel()


def is_gptq(model: nn.Module) -> bool:
    """Whether linear layers of a model hold GPTQ's packed weights."""
    return bool(gptq_weights(model))


def gptq_weights(model: nn.Module) -> dict[str, int]:
    """How many weights each GPTQ layer stands for; they are buffers, no parameters."""
    return {
        name: layer.in_features * layer.out_features
        for name, layer in model.named_modules()
        if "qweight" in layer._buffers
    }


def fp8_weights(model: nn.Module) -> dict[str, int]:
    """How many weights each layer in fp8 stands for; its codes are parameters, and there twice."""
    return {
        name: layer.in_features * layer.out_features
        for name, layer in model.named_modules()
        if isinstance(layer, Fp8Linear)
    }
