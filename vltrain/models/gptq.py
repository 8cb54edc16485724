"""Checkpoints whose linear layers are packed to 4 bits by GPTQ (arXiv:2210.17323), as published.

A packed layer is `qweight`, `qzeros`, `scales`, `g_idx` and a `bias`, where the plain one has a
`weight` and may have a bias. `GPTQModel` has kernels for them. Its fastest ones give no gradient to
what lies below them, and training with them goes on without a word while most adapters stand still;
the one in plain torch gives all gradients, and is the one that layers are loaded into here. Where a
model only answers, `int4_kernels` puts a fast one in its place.
"""

import io
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from vltrain.errors import VltrainError
from vltrain.models.catalog import read_json

METHOD = "gptq_in_torch"  # a name of our own: transformers' "gptq" builds layers without a bias
PACKED = ".qweight"
SETTINGS_FILE = "quantize_config.json"  # AutoGPTQ's; config.json may say it instead


@dataclass
class PackedLayers(QuantizationConfigMixin):
    """Which layers of a checkpoint are packed, and how."""

    quant_method: str = METHOD
    bits: int = 4
    group_size: int = 128  # weights of a row of inputs that share a scale
    sym: bool = True
    layers: list[str] = field(default_factory=list)
    biased: list[str] = field(default_factory=list)  # of the layers, those with a bias


def is_packed(folder: Path) -> bool:
    """Whether a checkpoint's settings say that GPTQ packed it; no weight is read."""
    return _settings(folder) is not None


def _settings(folder: Path) -> dict[str, Any] | None:
    """The quantization settings of a checkpoint; None where it is a plain one."""
    settings = read_json(folder / "config.json").get("quantization_config")
    if settings is None and (folder / SETTINGS_FILE).is_file():
        settings = read_json(folder / SETTINGS_FILE)
    return settings


def packed_layers(folder: Path) -> PackedLayers:
    """What a packed checkpoint says of its layers.

    Raises:
        VltrainError: it is packed in a way that is not read here.
    """
    settings = _settings(folder) or {}
    method = settings.get("quant_method", "gptq")  # quantize_config.json is GPTQ's alone
    layout = settings.get("checkpoint_format", "gptq")
    if method != "gptq" or layout != "gptq" or settings.get("desc_act"):
        shown = {"quant_method": method, "checkpoint_format": layout}
        raise VltrainError.at(
            str(folder),
            what=f"is quantized in a way that vltrain does not read ({shown}, desc_act "
            f"{settings.get('desc_act', False)})",
            fix="start from the bf16 checkpoint: vltrain qlora quantizes it while it is read",
        )
    names = tensor_names(folder)
    layers = sorted(name.removesuffix(PACKED) for name in names if name.endswith(PACKED))
    return PackedLayers(
        bits=settings.get("bits", 4),
        group_size=settings.get("group_size", 128),
        sym=settings.get("sym", True),
        layers=layers,
        biased=[layer for layer in layers if f"{layer}.bias" in names],
    )


def tensor_names(folder: Path) -> set[str]:
    """The names of all tensors in a checkpoint's safetensors files, read from their headers."""
    names: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            names |= set(tensors.keys())
    return names


@register_quantizer(METHOD)
class PackedLayersLoader(HfQuantizer):
    """Puts packed layers in the place of plain ones before `from_pretrained` reads the weights."""

    quantization_config: PackedLayers
    answers_alone = False  # whether its layers are in kernels that can be compiled, not trained

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        with redirect_stdout(io.StringIO()):  # it greets with a banner
            from gptqmodel.nn_modules.qlinear.torch import TorchLinear

        settings = self.quantization_config
        for name in settings.layers:
            plain = model.get_submodule(name)
            with torch.device("meta"):
                layer = TorchLinear(
                    bits=settings.bits,
                    group_size=settings.group_size,
                    sym=settings.sym,
                    desc_act=False,
                    in_features=plain.in_features,
                    out_features=plain.out_features,
                    bias=name in settings.biased,
                )
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, layer)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

        for name in self.quantization_config.layers:
            layer = model.get_submodule(name)
            layer.optimized = True  # compiling takes minutes, and a C++ compiler on a CPU
            layer.post_init()
            with redirect_stdout(io.StringIO()):  # it tells that it converts
                convert_gptq_v1_to_v2_format_module(layer, layer.bits, layer.pack_dtype)

    def is_serializable(self) -> bool:
        return False  # an adapter is saved, the base never

    @property
    def is_trainable(self) -> bool:
        return not self.answers_alone

    @property
    def is_compileable(self) -> bool:
        return self.answers_alone


def packed_weight(layer: nn.Module) -> torch.Tensor:
    """The weight that a packed layer stands for: float [out, in] in the dtype of its scales."""
    return layer.dequantize_weight().T


def unpacked_weight(
    qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, groups: torch.Tensor
) -> torch.Tensor:
    """The weight that the tensors of a packed layer stand for, without the layer.

    Args:
        qweight: int32 [in / 8, out], eight inputs in each number, the first one lowest.
        qzeros: int32 [groups, out / 8]; each zero point is stored less one.
        scales: float [groups, out].
        groups: `g_idx`, int [in].

    Returns:
        float32 [out, in].
    """
    codes = unpacked_codes(qweight.T).T  # [in, out]
    zeros = unpacked_codes(qzeros) + 1  # [groups, out]
    rows = groups.long()
    return ((codes - zeros[rows]) * scales.float()[rows]).T.contiguous()


def unpacked_codes(words: torch.Tensor) -> torch.Tensor:
    """The codes of 4 bits, int32 [R, 8 C], in numbers int32 [R, C], the lowest bits first."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=words.device)
    return (words[:, :, None] >> shifts & 15).flatten(1)
