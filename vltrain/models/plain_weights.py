"""The weights that a base stands for while adapters learn: as they lie, or out of their 4 bits."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vltrain.errors import VltrainError
from vltrain.models.catalog import family_of, read_json
from vltrain.models.census import skeleton
from vltrain.models.family import Family
from vltrain.models.fingerprint import weight_files
from vltrain.models.gptq import PackedLayers, is_packed, packed_layers, unpacked_weight
from vltrain.models.loading import LISTED, checkpoint_dtype
from vltrain.models.quantization import Nf4, dequantized_nf4, packed_names
from vltrain.models.tensor_files import TensorFiles


@dataclass(frozen=True)
class PlainWeights:
    """A base's tensors by their published names, plain and of one dtype, read one by one."""

    folder: Path
    model: PreTrainedModel  # without memory: names and shapes
    dtype: torch.dtype
    files: TensorFiles
    rounded: frozenset[str] = frozenset()  # layers that go through NF4 and back
    packed: PackedLayers = field(default_factory=PackedLayers)

    def names(self) -> Iterator[str]:
        """The names of all tensors, in the model's order."""
        return (name for name, _ in self.model.named_parameters())

    def shape(self, name: str) -> torch.Size:
        """The shape of a tensor."""
        return self.model.get_parameter(name).shape

    def layer(self, name: str) -> nn.Module:
        """The layer of that name, without memory."""
        return self.model.get_submodule(name)

    def read(self, name: str) -> Tensor:
        """A tensor: what the model computes with where it is held in 4 bits."""
        layer, _, own = name.rpartition(".")
        if own == "weight" and layer in self.packed.layers:
            parts = {key: self.files.read(f"{layer}.{key}") for key in ("qweight", "qzeros")}
            scales, groups = (self.files.read(f"{layer}.{key}") for key in ("scales", "g_idx"))
            return unpacked_weight(scales=scales, groups=groups, **parts).to(self.dtype)
        weight = self.files.read(name).to(self.dtype)
        return dequantized_nf4(weight) if own == "weight" and layer in self.rounded else weight


def described_weights(folder: Path, family: Family, nf4: Nf4 | None = None) -> PlainWeights:
    """A checkpoint's weights as its `config.json` and its files describe them, unproven.

    Args:
        folder: of a whole model, plain or packed by GPTQ.
        family: the model's.
        nf4: the layers whose weights are wanted as NF4 leaves them; None: as they lie.
    """
    values = read_json(folder / "config.json")
    values.pop("quantization_config", None)
    dtype = checkpoint_dtype(folder)
    model = skeleton(family, family.read_config(values), dtype)
    return PlainWeights(
        folder,
        model,
        dtype,
        TensorFiles(weight_files(folder)),
        frozenset() if nf4 is None else frozenset(packed_names(model, family, nf4)),
        packed_layers(folder) if is_packed(folder) else PackedLayers(),
    )


def plain_weights(folder: Path, nf4: Nf4 | None = None) -> PlainWeights:
    """A checkpoint's weights; no tensor of them is read yet.

    Args:
        folder: of a whole model, plain or packed by GPTQ.
        nf4: the layers whose weights are wanted as NF4 leaves them; None: as they lie.

    Raises:
        VltrainError: tensors are missing, to spare or of another shape than `config.json` says.
    """
    weights = described_weights(folder, family_of(folder), nf4)
    if faults := tensor_faults(weights):
        raise VltrainError.at(
            str(folder),
            what="the tensors are not those of the model; " + "; ".join(faults),
            fix="use a whole checkpoint whose config.json belongs to its weights",
        )
    return weights


def tensor_faults(weights: PlainWeights) -> list[str]:
    """What of a checkpoint's names and shapes is not as its `config.json` says, in words."""
    own = {f"{layer}.weight" for layer in weights.packed.layers}
    packs = ("qweight", "qzeros", "scales", "g_idx")
    packed = {f"{layer}.{part}" for layer in weights.packed.layers for part in packs}
    biases = {f"{layer}.bias" for layer in weights.packed.layers}  # a plain layer may have none
    plain = set(weights.names()) - own
    missing = sorted((plain | packed) - set(weights.files.names))
    unexpected = sorted(set(weights.files.names) - plain - packed - biases)
    mismatched = sorted(
        f"{name} {list(weights.files.shape(name))} for {list(weights.shape(name))}"
        for name in plain & set(weights.files.names)
        if weights.files.shape(name) != tuple(weights.shape(name))
    )
    kinds = {"missing": missing, "unexpected": unexpected, "mismatched": mismatched}
    return [
        f"{len(names)} {kind}: {', '.join(names[:LISTED])}"
        + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")
        for kind, names in kinds.items()
        if names
    ]
