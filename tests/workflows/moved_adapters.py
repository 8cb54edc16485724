"""Adapters on a tiny base that are moved at random, as if they had been trained."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from vltrain.config import FreezeConfig
from vltrain.models import load_model
from vltrain.models.adapters import Adapter, add_lora
from vltrain.models.catalog import QWEN_VL
from vltrain.models.fingerprint import weights_hash
from vltrain.models.saving import Origin, save_adapter

ATTENTION = "transformer.h.0.attn.c_attn.weight"


def write_adapter(base: Path, out: Path, *, scale: float = 0.1, **options) -> Path:
    """An adapter whose second matrices, and whole modules beside them, are moved at random."""
    freeze = FreezeConfig(projector=options.pop("projector", None))
    model = add_lora(load_model(base), QWEN_VL, freeze, Adapter(r=4, alpha=8, **options), seed=1)
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_A" not in name:
            parameter.data += scale * torch.randn_like(parameter)
    out.mkdir(parents=True)
    save_adapter(model, Origin(str(base), base, None, weights_hash(base)), out)
    return out


def in_dtype(folder: Path, dtype: torch.dtype) -> Path:
    """The same checkpoint with its weights and its config in another dtype."""
    file = folder / "model.safetensors"
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config))
    return folder
