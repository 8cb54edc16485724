"""A model that is about to learn -> where its parameters lie, and which of them learn."""

from collections import defaultdict

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from vltrain.models.adapters import ADAPTER_MARK, PEFT_PREFIX
from vltrain.models.family import Family
from vltrain.models.sizes import AdapterSizes, Census, Place, PlaceWeights


def skeleton(family: Family, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A family's model without memory: shapes and dtypes on the device `meta`.

    No file of weights is read, and 10 billion parameters take a second.
    """
    with torch.device("meta"):
        return family.model_class(config).to(dtype)


def take_census(model: PreTrainedModel, family: Family) -> Census:
    """Count the parameters of a model, wrapped by `peft` or not, on any device.

    A module that learns whole beside LoRA is a copy, and both copies lie in memory.
    """
    reading, head = (
        {id(p) for p in module.parameters()}
        for module in (model.get_input_embeddings(), model.get_output_embeddings())
    )
    places: dict[Place, PlaceWeights] = defaultdict(PlaceWeights)
    for name, parameter in model.named_parameters():
        place: Place
        if ADAPTER_MARK in name:
            place = "adapter"
        elif id(parameter) in reading:
            place = "embeddings"
        elif id(parameter) in head:
            place = "head"
        else:
            part = family.parts.of(name.removeprefix(PEFT_PREFIX))
            place = "layers" if part == "language" else part
        places[place] += _weights(parameter)
    return Census(dict(places), _adapter_sizes(model))


def _weights(parameter: nn.Parameter) -> PlaceWeights:
    count, size = parameter.numel(), parameter.numel() * parameter.element_size()
    if not parameter.requires_grad:
        return PlaceWeights(total=count, total_bytes=size)
    matrix = count if parameter.dim() > 1 else 0
    return PlaceWeights(count, count, matrix, size, size)


def _adapter_sizes(model: nn.Module) -> AdapterSizes:
    adapted = [module for module in model.modules() if isinstance(module, LoraLayer)]
    return AdapterSizes(
        inputs=sum(module.in_features for module in adapted),
        ranks=sum(sum(module.r.values()) for module in adapted),
        outputs=sum(module.out_features for module in adapted),
        dropout=any(
            not isinstance(dropout, nn.Identity)  # which peft has in its place
            for module in adapted
            for dropout in module.lora_dropout.values()
        ),
    )
