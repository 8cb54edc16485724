"""Several adapters beside one base, active together."""

import torch
from peft import PeftModel, set_peft_model_state_dict
from peft.tuners.lora.layer import LoraLayer

from vltrain.models.adapted import load_adapted
from vltrain.models.adapters import (
    ADAPTER_MARK,
    COPY_MARK,
    ORIGINAL_MARK,
    published_name,
    wrap_plain_layers_first,
)
from vltrain.models.hub import ResolvedModel
from vltrain.models.merging import MergedWeights, SavedAdapter
from vltrain.models.quantization import Nf4


def load_side_by_side(
    merged: MergedWeights, base: ResolvedModel, quantize: Nf4 | None
) -> PeftModel:
    """A base with adapters beside its weights, not merged, in eval mode.

    Args:
        merged: names the adapters and the share of each. What learned whole is taken from it,
            for `peft` has one copy of a module active at a time.
        base: as `find_base` gives it.
        quantize: the layers to hold in 4 bits.

    Raises:
        VltrainError: an adapter does not fit the base, or has not been read whole.
    """
    first, *others = merged.adapters
    model = load_adapted(first.folder, base, dtype=merged.base.dtype, quantize=quantize)
    names = ["default"]
    for number, adapter in enumerate(others):
        names.append(f"merged{number}")
        _add_beside(model, adapter, names[-1])
    if others:
        _replace_whole(model, merged)
        weights = {n: a.weight for n, a in zip(names, merged.adapters, strict=True)}
        for layer in model.modules():
            if isinstance(layer, LoraLayer):
                active = [name for name in names if name in layer.scaling]
                layer.set_adapter(active)
                for name in active:
                    layer.scaling[name] *= weights[name]
    return model.eval()


def _add_beside(model: PeftModel, adapter: SavedAdapter, name: str) -> None:
    """Put the products of an adapter, not what learned whole, beside those that are there."""
    config = adapter.config
    whole, config.modules_to_save = config.modules_to_save, None
    wrap_plain_layers_first(config)
    model.add_adapter(name, config)
    config.modules_to_save = whole
    stored = {n: adapter.files.read(n) for n in adapter.files.names if ADAPTER_MARK in n}
    set_peft_model_state_dict(model, stored, adapter_name=name)


@torch.no_grad()
def _replace_whole(model: PeftModel, merged: MergedWeights) -> None:
    """Put what learned whole, in its weighted sum, in the place of the copies that learned."""
    whole = {name for adapter in merged.adapters for name in adapter.whole}
    for name, parameter in model.named_parameters():
        plain = published_name(name)
        if plain in whole and (COPY_MARK in name or ORIGINAL_MARK not in name):
            parameter.copy_(merged.read(plain))
