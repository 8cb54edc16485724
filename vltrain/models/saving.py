"""Weights to a folder that keeps the layout of the checkpoint they came from."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file

from vltrain.models.catalog import read_json

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")
MAX_SHARD = "2GB"


def save_like(base: Path, tensors: Mapping[str, torch.Tensor], out: Path) -> None:
    """Write tensors in safetensors shards of 2 GB beside what else a loader needs from `base`.

    Config, tokenizer, generation settings and any other small file of the base come along as
    they are; only the config's dtype follows the tensors.

    Args:
        base: folder of the checkpoint that the tensors belong to.
        tensors: by their published names, floating ones all of one dtype.
        out: an existing folder to write into.
    """
    for file in sorted(base.iterdir()):
        if file.is_file() and not file.name.endswith(WEIGHT_SUFFIXES):
            shutil.copyfile(file, out / file.name)
    _set_config_dtype(out / "config.json", next(iter(tensors.values())).dtype)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=MAX_SHARD)
    for filename, names in split.filename_to_tensors.items():
        save_file({n: tensors[n] for n in names}, out / filename, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _set_config_dtype(path: Path, dtype: torch.dtype) -> None:
    config = read_json(path)
    name = str(dtype).removeprefix("torch.")
    key = "dtype" if "dtype" in config else "torch_dtype"
    if config.get(key) != name:
        config[key] = name
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
