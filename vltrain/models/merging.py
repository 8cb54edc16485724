"""Adapters into the weights below them, one tensor at a time, by `peft`'s own arithmetic."""

import copy
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import (
    LoraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.lora.layer import LoraLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from torch import Tensor, nn

from vltrain.errors import VltrainError
from vltrain.models.adapted import saved_shape
from vltrain.models.adapters import ADAPTER_MARK, PEFT_PREFIX, wrap_plain_layers_first
from vltrain.models.loading import LISTED
from vltrain.models.plain_weights import PlainWeights
from vltrain.models.tensor_files import TensorFiles

BESIDE = "beside"  # begins the names of adapters on a layer
ROWS = 4096  # of a matrix that are widened to float32 at a time


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter in its folder, and how much of it is merged."""

    folder: Path
    weight: float
    config: LoraConfig
    files: TensorFiles
    layers: dict[str, dict[str, str]]  # layer -> name below `peft` -> name in the file
    whole: dict[str, str]  # parameter that learned whole -> name in the file


def saved_adapter(folder: Path, weight: float = 1.0) -> SavedAdapter:
    """What an adapter's folder holds; of its tensors only the names are read.

    Raises:
        VltrainError: it is no LoRA adapter, or its weights are missing.
    """
    config = saved_shape(folder)
    found = [folder / n for n in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME) if (folder / n).is_file()]
    if not found:
        raise VltrainError.at(
            str(folder),
            what=f"does not fit its base or is not whole (there is no {SAFETENSORS_WEIGHTS_NAME})",
            fix="copy the whole folder that the run wrote",
        )
    files = TensorFiles(found[:1])
    layers: dict[str, dict[str, str]] = defaultdict(dict)
    whole = {}
    for name in files.names:
        plain = name.removeprefix(PEFT_PREFIX)
        if ADAPTER_MARK in plain:
            layers[plain.partition(ADAPTER_MARK)[0]][plain] = name
        else:
            whole[plain] = name
    return SavedAdapter(folder, weight, config, files, dict(layers), whole)


def refuse_unfit(adapters: Sequence[SavedAdapter], base: PlainWeights) -> None:
    """Raise VltrainError where an adapter has not the names and sizes that it has on this base.

    Nor do adapters go together that are no sums.
    """
    for adapter in adapters:
        if faults := _size_faults(adapter, base):
            more = f" and {len(faults) - LISTED} more" if len(faults) > LISTED else ""
            raise VltrainError.at(
                str(adapter.folder),
                what=f"does not fit its base or is not whole; {len(faults)} tensors: "
                + ", ".join(faults[:LISTED])
                + more,
                fix="copy the whole folder that the run wrote, and name its own base",
            )
        pissa = str(adapter.config.init_lora_weights).startswith("pissa")
        if len(adapters) > 1 and (adapter.config.use_dora or pissa):
            raise VltrainError.at(
                str(adapter.folder),
                what="is no product that is added to its base (but DoRA or PiSSA), so it does not "
                "go with other adapters",
                fix="merge it alone, and train the next adapter on what comes out",
            )


def _size_faults(adapter: SavedAdapter, base: PlainWeights) -> list[str]:
    """The tensors of an adapter that are missing, to spare or of another size on a base."""
    config = copy.deepcopy(adapter.config)
    config.init_lora_weights = False  # there is nothing to begin from without memory
    config.base_model_name_or_path = None
    wrap_plain_layers_first(config)
    try:
        wrapped = get_peft_model(copy.deepcopy(base.model), config)
    except (RuntimeError, ValueError) as error:
        return [str(error)]
    tensors = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    expected = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    stored = {name: adapter.files.shape(name) for name in adapter.files.names}
    return sorted(
        f"{name.removeprefix(PEFT_PREFIX)} {list(stored.get(name, ())) or 'missing'}"
        f"{f' for {list(expected[name])}' if name in expected else ', which is not of the model'}"
        for name in expected.keys() | stored.keys()
        if expected.get(name) != stored.get(name)
    )


@dataclass
class MergedWeights:
    """A base's tensors with adapters in them, by published names, made when they are read."""

    base: PlainWeights
    adapters: Sequence[SavedAdapter]
    changed: set[str] = field(default_factory=set)  # of what was read: other than the base's

    def shapes(self) -> dict[str, Tensor]:
        """All tensors, without memory."""
        return {
            name: torch.empty(self.base.shape(name), dtype=self.base.dtype, device="meta")
            for name in self.base.names()
        }

    def read(self, name: str) -> Tensor:
        """A merged tensor: computed in float32, rounded once to the base's dtype."""
        plain = self.base.read(name)
        layer, _, own = name.rpartition(".")
        merged = plain
        if any(name in adapter.whole for adapter in self.adapters):
            merged = self._whole(name, plain)
        elif own == "weight" and any(layer in adapter.layers for adapter in self.adapters):
            adapted = self.layer(layer, plain)
            adapted.merge(adapter_names=list(adapted.scaling))
            merged = adapted.get_base_layer().weight.detach().to(plain.dtype)
        if merged is not plain and not torch.equal(merged, plain):
            self.changed.add(name)
        return merged.contiguous()

    def layer(self, name: str, weight: Tensor) -> LoraLayer:
        """A layer of the base in float32 with its adapters beside it, all of them active.

        Args:
            name: of the layer.
            weight: the base's, float [out, in].

        Raises:
            VltrainError: `peft` cannot put an adapter there.
        """
        plain = copy.deepcopy(self.base.layer(name))
        wide = weight.to(torch.float32, copy=True)  # merged in place
        plain.weight = nn.Parameter(wide, requires_grad=False)
        if getattr(plain, "bias", None) is not None:
            bias = self.base.read(f"{name}.bias").float()
            plain.bias = nn.Parameter(bias, requires_grad=False)
        tree, parent, own = _tree_of(name)
        parent.add_module(own, plain)
        weights = {}
        for number, adapter in enumerate(self.adapters):
            if name in adapter.layers:
                key = f"{BESIDE}{number}"
                _put_beside(tree, name, adapter, key)
                del tree.peft_config  # `peft` warns of a second adapter where it finds this
                weights[key] = adapter.weight
        adapted = parent.get_submodule(own)
        for key, weight_of_adapter in weights.items():
            adapted.scaling[key] *= weight_of_adapter
        adapted.set_adapter(list(weights))
        return adapted.requires_grad_(False).eval()

    def _whole(self, name: str, plain: Tensor) -> Tensor:
        """A tensor that learned whole; several move the base's by their weighted differences."""
        learned = [a for a in self.adapters if name in a.whole]
        if len(self.adapters) == 1:
            return learned[0].files.read(learned[0].whole[name]).to(plain.dtype)
        merged = plain.clone()
        tensors = [(a.weight, a.files.read(a.whole[name])) for a in learned]
        for start in range(0, len(plain), ROWS):
            rows = slice(start, start + ROWS)
            wide = plain[rows].float()
            moves = [weight * (tensor[rows].float() - wide) for weight, tensor in tensors]
            merged[rows] = (wide + sum(moves)).to(plain.dtype)
        return merged


def _tree_of(name: str) -> tuple[nn.Module, nn.Module, str]:
    """Modules that hold nothing but the way to a layer: the root, the layer's parent, its name."""
    *above, own = name.split(".")
    tree = parent = nn.Module()
    for part in above:
        parent.add_module(part, nn.Module())
        parent = parent.get_submodule(part)
    return tree, parent, own


def _put_beside(tree: nn.Module, layer: str, adapter: SavedAdapter, key: str) -> None:
    """Put the share of an adapter that belongs to a layer beside it, under the name `key`."""
    config = copy.deepcopy(adapter.config)
    config.modules_to_save = None
    config.target_modules = [layer]
    wrap_plain_layers_first(config)
    tensors = {n: adapter.files.read(stored) for n, stored in adapter.layers[layer].items()}
    try:
        inject_adapter_in_model(config, tree, adapter_name=key)
        unread = set_peft_model_state_dict(tree, tensors, adapter_name=key).unexpected_keys
        there = get_peft_model_state_dict(tree, adapter_name=key, save_embedding_layers=False)
        lost = {n for n in there if n not in tensors and f".{BESIDE}" not in n}  # of this one
    except (RuntimeError, ValueError) as error:
        unread, lost = [str(error)], set()
    if unread or lost:
        raise VltrainError.at(
            str(adapter.folder),
            what=f"does not fit its base or is not whole: {', '.join(sorted({*unread, *lost}))}",
            fix="copy the whole folder that the run wrote",
        )
