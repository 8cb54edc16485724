"""From a checkpoint's folder to a model and its processor, every tensor accounted for."""

import importlib.util
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.utils.quantization_config import QuantizationConfigMixin

from vltrain.errors import VltrainError
from vltrain.models.catalog import family_of, read_json
from vltrain.models.family import Family
from vltrain.models.gptq import is_packed, packed_layers
from vltrain.models.hub import resolve_model
from vltrain.models.quantization import Nf4, nf4_config

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
LISTED = 10  # names of tensors that an error spells out


def load_model(
    path: str | Path,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    quantize: Nf4 | None = None,
) -> PreTrainedModel:
    """A model as its checkpoint has it, in eval mode.

    Args:
        path: a folder as published or as vltrain saved it, or a name on the Hugging Face hub
            (`org/name`, `org/name@revision`).
        dtype: of the weights; "auto" is what the checkpoint's config says. With it every
            tensor equals its file bit for bit.
        device: where the weights go; default the CPU.
        quantize: the layers to hold in 4 bits, unless the checkpoint has packed them already.
            Tensor by tensor they are read, moved to the device and quantized there: the whole
            model is never in memory in 16 bits.

    Raises:
        VltrainError: the folder is not whole: a file, a shard or a tensor is missing, a tensor
            is unexpected or of another shape, or the family is not known.
    """
    folder = resolve_model(str(path)).path
    family = family_of(folder)
    values = read_json(folder / "config.json")
    values.pop("quantization_config", None)  # `quantization_of` reads it
    config = family.read_config(values)
    refuse_missing_shards(folder)
    if isinstance(dtype, str):
        dtype = checkpoint_dtype(folder) if dtype == "auto" else named_dtype(dtype)
    quantization = quantization_of(folder, family, quantize, dtype)
    try:
        model, info = family.model_class.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            device_map=None if device is quantization is None else {"": device or "cpu"},
            quantization_config=quantization,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that they are listed with the others
            local_files_only=True,
        )
    except (OSError, RuntimeError, SafetensorError, UnpicklingError) as error:
        raise VltrainError.at(
            str(folder), what=f"the weights cannot be read ({error})", fix="download them again"
        ) from error
    refuse_incomplete(folder, info)
    freeze_constants(model, family)
    return model


def quantization_of(
    folder: Path, family: Family, quantize: Nf4 | None, dtype: torch.dtype
) -> QuantizationConfigMixin | None:
    """How the linear layers of a checkpoint are to be held; None: as they are.

    Raises:
        VltrainError: it is packed to 4 bits already in a way that is not read here, or by a
            method whose library is missing.
    """
    if not is_packed(folder):
        return None if quantize is None else nf4_config(family, quantize, dtype)
    if importlib.util.find_spec("gptqmodel") is None:
        raise VltrainError.at(
            str(folder),
            what="is packed by GPTQ, and the package gptqmodel is not installed",
            fix="pip install 'gptqmodel>=7.6,<7.7'",
        )
    return packed_layers(folder)


def load_processor(path: str | Path) -> Any:
    """The processor of a checkpoint: `.tokenizer`, `.image_processor`.

    Args:
        path: as for `load_model`.

    Raises:
        VltrainError: the vocabulary or the config is missing or broken.
    """
    folder = resolve_model(str(path), weights=False).path
    return family_of(folder).read_processor(folder)


def foreign_id_error(where: str, token_id: int, rows: int, folder: Path) -> VltrainError:
    """The refusal of an id that the embedding matrix of a model has no row for.

    Args:
        where: the record.
        token_id: the id.
        rows: of the matrix.
        folder: the model's.
    """
    return VltrainError.at(
        where,
        what=f"has the id {token_id}, and the model of {folder} knows those below {rows} only",
        fix="use the vocabulary that belongs to these weights",
    )


def freeze_constants(model: PreTrainedModel, family: Family) -> None:
    """Take the gradient off what is stored but does not learn; loading forgets it."""
    for name in family.constants:
        model.get_parameter(name).requires_grad_(False)


def refuse_missing_shards(folder: Path) -> None:
    """Raise VltrainError when the index of a sharded checkpoint names files that are not there."""
    for index in INDEX_FILES:
        if (folder / index).is_file():
            shards = set(read_json(folder / index).get("weight_map", {}).values())
            missing = sorted(s for s in shards if not (folder / s).is_file())
            if missing:
                raise VltrainError.at(
                    str(folder),
                    what=f"{index} names {', '.join(missing)}, which the folder lacks",
                    fix="download the missing files into the folder",
                )
            return


def refuse_incomplete(folder: Path, info: dict[str, Any]) -> None:
    """Raise VltrainError unless the checkpoint filled every tensor and had none to spare."""
    faults = []
    for kind in ("missing", "unexpected", "mismatched"):
        names = sorted(str(n[0] if isinstance(n, tuple) else n) for n in info[f"{kind}_keys"])
        if names:
            more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
            faults.append(f"{len(names)} {kind}: {', '.join(names[:LISTED])}{more}")
    if faults:
        raise VltrainError.at(
            str(folder),
            what="the tensors are not those of the model; " + "; ".join(faults),
            fix="use a whole checkpoint whose config.json belongs to its weights",
        )


def checkpoint_dtype(folder: Path) -> torch.dtype:
    """The dtype that a checkpoint's `config.json` names; float32 where it names none."""
    config = read_json(folder / "config.json")
    return named_dtype(config.get("torch_dtype") or config.get("dtype") or "float32")


def dtype_for_machine(dtype: str = "auto") -> str:
    """A recipe's `dtype` resolved: "auto" is bf16 on a GPU that has it and fp32 elsewhere."""
    if dtype != "auto":
        return dtype
    return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "fp32"


def named_dtype(name: str) -> torch.dtype:
    """The dtype of a name such as "bf16" or "bfloat16".

    Raises:
        VltrainError: it is no dtype that weights are held in.
    """
    if name not in DTYPES:
        raise VltrainError.at(
            "dtype", what=f"{name!r} is no dtype of weights", fix="use bf16, fp16 or fp32"
        )
    return DTYPES[name]
