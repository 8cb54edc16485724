"""Which layers of a model are held in fp8 under adapters, and what that needs."""

import torch
from torch import nn

from vltrain.errors import VltrainError
from vltrain.models.adapters import ADAPTER_MARK, published_name
from vltrain.models.family import Family, has_prefix
from vltrain.models.fp8_linear import KERNEL_SINCE, MULTIPLE, Fp8Linear
from vltrain.models.quantization import Nf4, kept_modules

KEY = "lora.base"


def hold_in_fp8(model: nn.Module, family: Family) -> int:
    """Hold the frozen linear layers of the language model in fp8, in place.

    Embeddings and head, projector and vision tower stay as they are. What the model's weights were
    is gone afterwards: an adapter is merged into those on the disk.

    Args:
        model: with its adapters, whose own layers stay as they are. Weights are rounded on the GPU
            where there is one, and stay there.

    Returns:
        How many layers are held so.

    Raises:
        VltrainError: a layer's widths do not fit.
    """
    refuse_unfit_widths(model, family)
    names = frozen_layers(model, family)
    for name in names:
        layer = model.get_submodule(name)
        weight = layer.weight.detach()
        if torch.cuda.is_available():
            weight = weight.cuda()
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, Fp8Linear(weight, layer.bias))
    return len(names)


def frozen_layers(model: nn.Module, family: Family) -> list[str]:
    """Names of the language model's linear layers that do not learn, those under adapters too."""
    kept = kept_modules(family, Nf4())
    return [
        name
        for name, layer in model.named_modules()
        if type(layer) is nn.Linear
        and ADAPTER_MARK not in name
        and not any(has_prefix(published_name(name), module) for module in kept)
    ]


def refuse_unfit_widths(model: nn.Module, family: Family) -> None:
    """Raise VltrainError where a layer's widths are none that fp8 is multiplied in.

    Args:
        model: with or without memory, with or without adapters.
    """
    for name in frozen_layers(model, family):
        layer = model.get_submodule(name)
        if layer.in_features % MULTIPLE or layer.out_features % MULTIPLE:
            raise VltrainError.at(
                KEY,
                what=f"fp8 is multiplied in widths that {MULTIPLE} divides, and "
                f"{published_name(name)} is {layer.in_features} x {layer.out_features}",
                fix=f"take out {KEY}",
            )


def refuse_old_gpu() -> None:
    """Raise VltrainError where a GPU is there that does not multiply fp8; a CPU emulates it."""
    if not torch.cuda.is_available():
        return
    found = torch.cuda.get_device_capability()
    if torch.version.hip is None and found >= KERNEL_SINCE:
        return
    own = "an AMD GPU" if torch.version.hip else f"of compute capability {found[0]}.{found[1]}"
    raise VltrainError.at(
        KEY,
        what="fp8 is multiplied by NVIDIA GPUs of compute capability 8.9 (Ada, Hopper) and later, "
        f"and {torch.cuda.get_device_name()} is {own}",
        fix=f"take out {KEY}, or run `vltrain qlora` for less memory",
    )
