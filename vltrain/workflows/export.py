"""A model's folder in another layout, its weights the same to the bit."""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from vltrain import __version__
from vltrain.errors import VltrainError
from vltrain.models.catalog import family_of
from vltrain.models.family import Family
from vltrain.models.gptq import is_packed
from vltrain.models.hub import ResolvedModel, resolve_model
from vltrain.models.layout import Layout, LayoutOf
from vltrain.models.manifest import EXPORT_REPORT, file_list, write_report
from vltrain.models.plain_weights import PlainWeights, plain_weights
from vltrain.models.saving import companions, save_shards
from vltrain.workflows.quiet import hide_weight_bars
from vltrain.workflows.reload import reload_in_a_fresh_process
from vltrain.workflows.whole_folder import refuse_existing, refuse_small_disk, whole_folder

SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([KMGT])B", re.IGNORECASE)
UNITS = {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}  # bytes


def export(
    model: str,
    out: Path,
    to: str,
    *,
    max_shard_size: str = "2GB",
    console: Console | None = None,
) -> None:
    """Write a whole model in another layout.

    Weights are read and written shard by shard, and held against those that they came from; a
    fresh process reads the folder. Only then does it get its name: an export that is cut off
    leaves no `out`. `export.json` in it has the hash of every file.

    Args:
        model: a folder in any layout that `load_model` reads, or a name on the hub.
        out: the folder to make.
        to: a layout of the model's family: "original" or "transformers".
        max_shard_size: of a file of weights, such as "2GB" or "500MB".
        console: where to report; default the terminal.

    Raises:
        VltrainError: `out` exists or the disk is too small for it; the model is an adapter, is
            packed to 4 bits or is not whole; or its family has no such layout.
    """
    console = console or Console()
    hide_weight_bars()
    refuse_existing(out)
    max_shard_bytes = size_in_bytes(max_shard_size)
    source = resolve_model(model)
    layout_of = known_layout(family_of(source.path), to)
    refuse_packed(source.path)
    weights = plain_weights(source.path)
    shapes = stored_shapes(weights)
    refuse_small_disk(out, sum(shape.nbytes for shape in shapes.values()))
    layout = layout_of(source.path, next(iter(shapes.values())).dtype)
    console.print(f"writing {model} in the layout {to}", soft_wrap=True)
    with whole_folder(out) as draft:
        write_beside(source.path, layout, draft)
        save_shards(
            shapes, lambda name: weights.files.read(name).contiguous(), draft, max_shard_bytes
        )
        report = description(source, to, shapes) | {"files": file_list(draft)}
        write_report(draft, report, EXPORT_REPORT)
        console.print("reading it back in a fresh process")
        reload_in_a_fresh_process(draft, None)
        refuse_other_tensors(weights, plain_weights(draft))
    size = sum(file.stat().st_size for file in out.iterdir()) / 1e9
    console.print(
        f"done: {out}, {len(shapes)} tensors equal to the bit, {size:,.3f} GB", soft_wrap=True
    )
    for remark in layout.remarks:
        console.print(f"note: {remark}", soft_wrap=True)


def size_in_bytes(text: str) -> int:
    """The number of bytes that "2GB" means.

    Raises:
        VltrainError: it is no size, or none at all.
    """
    found = SIZE.fullmatch(text.strip())
    size = int(float(found[1]) * UNITS[found[2].upper()]) if found else 0
    if not size:
        raise VltrainError.at(
            "--max-shard-size", what=f"{text!r} is no size", fix="write 2GB, or 500MB"
        )
    return size


def known_layout(family: Family, to: str) -> LayoutOf:
    """How the family writes a layout.

    Raises:
        VltrainError: it has none of that name.
    """
    if to not in family.layouts:
        raise VltrainError.at(
            f"--to {to}",
            what=f"{family.name} has no such layout",
            fix=f"use one of {', '.join(family.layouts)}",
        )
    return family.layouts[to]


def refuse_packed(folder: Path) -> None:
    """Raise VltrainError where a model is packed to 4 bits."""
    if is_packed(folder):
        raise VltrainError.at(
            str(folder),
            what="is packed to 4 bits: its tensors are those of no 16-bit layout",
            fix="use it as it is, for this is the form that programs for GPTQ read; or name the "
            "16-bit checkpoint it was made of, or what vltrain merge made of it",
        )


def stored_shapes(weights: PlainWeights) -> dict[str, torch.Tensor]:
    """All tensors without memory, in the dtypes of their files."""
    return {
        name: torch.empty_like(weights.files.read(name), device="meta") for name in weights.names()
    }


def write_beside(source: Path, layout: Layout, draft: Path) -> None:
    """Write what stands beside the weights: the layout's own files, and copies of all others."""
    for file in companions(source):
        if file.name not in layout.texts:
            shutil.copyfile(file, draft / file.name)
    for name, text in layout.texts.items():
        if text is not None:
            (draft / name).write_text(text, encoding="utf-8")


def refuse_other_tensors(source: PlainWeights, written: PlainWeights) -> None:
    """Raise VltrainError unless each tensor on the disk is that of the source to the bit."""
    for name in source.names():
        before, after = source.files.read(name), written.files.read(name)
        if before.dtype is not after.dtype or not torch.equal(before, after):
            raise VltrainError.at(
                name,
                what="is on the disk not what was read; nothing was kept",
                fix="check the disk, and run the same command again",
            )


def description(
    source: ResolvedModel, to: str, shapes: Mapping[str, torch.Tensor]
) -> dict[str, Any]:
    """What was exported: the first part of `export.json`. It travels, so no path is in it."""
    return {
        "vltrain": __version__,
        "model": source.public_name,
        "revision": source.revision,
        "to": to,
        "tensors": len(shapes),
    }
