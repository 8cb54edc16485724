"""Weights to a folder that keeps the layout of the checkpoint they came from."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from peft import PeftModel
from safetensors.torch import save_file

from vltrain.models.catalog import read_json
from vltrain.models.gptq import SETTINGS_FILE
from vltrain.models.manifest import REPORT_FILES
from vltrain.models.quantization import Nf4

ORIGIN_FILE = "vltrain.json"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")
MAX_SHARD = "2GB"


@dataclass(frozen=True)
class Origin:
    """The base that a result was trained from. It travels in the result's folder."""

    name: str  # as the recipe calls it: a folder, or org/name[@revision] on the hub
    path: Path  # where it lay
    revision: str | None  # the hub's commit; None for a folder of the user's own
    hash: str | None  # of its weights; None where nobody wrote it down
    nf4: Nf4 | None = None  # how its weights were held in 4 bits meanwhile

    def as_json(self) -> dict[str, Any]:
        """The form that `vltrain.json` has."""
        values = {
            "name": self.name,
            "path": str(self.path.resolve()),
            "revision": self.revision,
            "hash": self.hash,
        }
        return values if self.nf4 is None else values | {"nf4": asdict(self.nf4)}


def write_origin(origin: Origin, out: Path) -> None:
    """Write `vltrain.json` into a result's folder."""
    text = json.dumps({"base": origin.as_json()}, indent=2, ensure_ascii=False)
    (out / ORIGIN_FILE).write_text(text + "\n", encoding="utf-8")


def save_adapter(
    model: PeftModel,
    origin: Origin,
    out: Path,
    tensors: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write an adapter as plain `peft`, with the base's tokenizer and the base's hash beside it.

    Args:
        model: wrapped by `peft`; its learned modules are saved in their own dtype.
        origin: the base; the adapter's config names it.
        out: an existing folder to write into.
        tensors: what it has learned, by the names of its parameters, where the model itself does
            not hold it whole.
    """
    for config in model.peft_config.values():
        if origin.revision is None:
            config.base_model_name_or_path = str(origin.path.resolve())
        else:
            config.base_model_name_or_path = origin.name.partition("@")[0]
            config.revision = origin.revision
    model.save_pretrained(str(out), state_dict=tensors, save_embedding_layers=False)
    for file in companions(origin.path):
        if file.name != "config.json" and file.suffix != ".py":
            shutil.copyfile(file, out / file.name)
    write_origin(origin, out)


def companions(folder: Path) -> list[Path]:
    """The files of a checkpoint that hold no weights: config, tokenizer, settings, code."""
    return sorted(
        file
        for file in folder.iterdir()
        if file.is_file()
        and not file.name.endswith(WEIGHT_SUFFIXES)
        and file.name not in (ORIGIN_FILE, *REPORT_FILES)
    )


def save_like(base: Path, tensors: Mapping[str, torch.Tensor], out: Path) -> None:
    """Write tensors in safetensors shards of 2 GB beside what else a loader needs from `base`.

    Config, tokenizer, generation settings and any other small file of the base come along as
    they are; only the config's dtype follows the tensors.

    Args:
        base: folder of the checkpoint that the tensors belong to.
        tensors: by their published names, floating ones all of one dtype.
        out: an existing folder to write into.
    """
    copy_companions(base, next(iter(tensors.values())).dtype, out)
    shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    save_shards(shapes, lambda name: tensors[name].detach().cpu().contiguous(), out)


def copy_companions(base: Path, dtype: torch.dtype, out: Path) -> None:
    """Copy what lies beside a checkpoint's weights; the config speaks of plain ones of a dtype."""
    for file in companions(base):
        if file.name != SETTINGS_FILE:
            shutil.copyfile(file, out / file.name)
    config = read_json(out / "config.json")
    name = str(dtype).removeprefix("torch.")
    key = "dtype" if "dtype" in config else "torch_dtype"
    if config.get(key) != name or "quantization_config" in config:
        config[key] = name
        config.pop("quantization_config", None)
        text = json.dumps(config, indent=2, ensure_ascii=False)
        (out / "config.json").write_text(text + "\n", encoding="utf-8")


def save_shards(
    shapes: Mapping[str, torch.Tensor],
    read: Callable[[str], torch.Tensor],
    out: Path,
    max_shard_bytes: int | None = None,
) -> None:
    """Write tensors in safetensors shards, no more than one shard in memory.

    Args:
        shapes: what will be written, on the device `meta`.
        read: gives a tensor by its name, on the CPU and contiguous.
        out: an existing folder to write into.
        max_shard_bytes: of a file, unless one tensor alone is larger; default `MAX_SHARD`.
    """
    limit = MAX_SHARD if max_shard_bytes is None else max_shard_bytes
    split = split_torch_state_dict_into_shards(dict(shapes), max_shard_size=limit)
    for filename, names in split.filename_to_tensors.items():
        save_file({n: read(n) for n in names}, out / filename, metadata={"format": "pt"})
        (out / filename).chmod(out.stat().st_mode & 0o666)  # `save_file` lets its owner alone read
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
