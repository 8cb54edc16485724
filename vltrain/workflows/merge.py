"""Adapter + base -> weights that stand alone, proven equal before they get their name."""

import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor, nn

from vltrain.data.encoding import encode
from vltrain.errors import VltrainError
from vltrain.models.adapted import find_base, load_adapted
from vltrain.models.gptq import is_packed
from vltrain.models.loading import checkpoint_dtype, load_model, load_processor
from vltrain.models.saving import save_like
from vltrain.workflows.quiet import hide_weight_bars

# How far the logits of the merged weights may lie from those of base + adapter, as a share of
# their size (root mean square): sums in another order, and weights rounded once more.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}

PROBES = (
    [
        {"from": "user", "value": "What lies on <ref>the table</ref>? 桌子上有什么？"},
        {"from": "assistant", "value": "<box>(12,345),(678,901)</box> 3 apples, 一个梨。"},
    ],
    [
        {"from": "user", "value": "Picture 1: <img>probe.png</img>\nHow many dots are red?"},
        {"from": "assistant", "value": "Some 2,000 of them."},
    ],
)
"""The fixed inputs of the comparison: text alone, and a picture (of noise)."""


@dataclass(frozen=True)
class Difference:
    """Two distances between logits, as shares of the size of base + adapter's own."""

    merged: float  # of the merged weights from base + adapter
    base: float  # of the base alone: what the adapter has learned


def merge(
    adapter: Path, out: Path, base: str | None = None, console: Console | None = None
) -> None:
    """Write base + adapter as a model of its own, in the base's layout, names and dtype.

    What was written is loaded again and must answer like base + adapter on fixed inputs. Only
    then does the folder get its name: a merge that is cut off leaves no `out`.

    Args:
        adapter: the folder of an adapter, such as RUN/final or a checkpoint of a run.
        out: the folder to make.
        base: where the base is now, a folder or a name on the hub; default where it was.
        console: where to report; default the terminal.

    Raises:
        VltrainError: `out` exists, the adapter is not whole or of another base, it changes
            nothing, or the merged weights answer otherwise than base + adapter.
    """
    console = console or Console()
    hide_weight_bars()
    if out.exists() or out.is_symlink():
        raise VltrainError.at(
            str(out), what="exists already", fix="name another folder, or remove this one first"
        )
    console.print("comparing the base's weights with those that the adapter was trained on")
    source = find_base(adapter, base)
    if is_packed(source.path):
        raise VltrainError.at(
            str(source.path),
            what="is packed to 4 bits, and an adapter cannot be merged into them",
            fix="use the adapter beside it: vltrain chat takes the adapter's folder",
        )
    dtype = checkpoint_dtype(source.path)
    inputs = probe_inputs(load_processor(source.path))
    console.print(f"merging {adapter} into {source.path}", soft_wrap=True)
    adapted = load_adapted(adapter, source, dtype=dtype)
    expected = probe_logits(adapted, inputs)
    with adapted.disable_adapter():
        unchanged = probe_logits(adapted, inputs)
    tensors = {
        name: parameter.detach().to(dtype)
        for name, parameter in adapted.merge_and_unload().named_parameters()
    }
    del adapted
    with whole_folder(out) as draft:
        save_like(source.path, tensors, draft)
        tensors.clear()  # before the same weights are loaded again
        console.print("reading the merged weights back")
        found = probe_logits(load_model(draft, dtype=dtype), inputs)
        difference = compare(found, expected, unchanged, dtype=dtype, adapter=adapter)
    report(console, out, difference, dtype)


def report(console: Console, out: Path, difference: Difference, dtype: torch.dtype) -> None:
    """Say how near the merge came, and when rounding weighs as much as what was learned."""
    name = str(dtype).removeprefix("torch.")
    console.print(
        f"done: {out}, in {name}; its logits differ from those of base + adapter by "
        f"{difference.merged:.2%}, the adapter moves them by {difference.base:.2%}",
        soft_wrap=True,
    )
    if difference.merged >= difference.base / 2:
        console.print(
            f"warning: rounding to {name} weighs as much as what the adapter has learned; train "
            "longer or at a higher learning rate, or use the adapter unmerged",
            soft_wrap=True,
        )


def probe_inputs(processor: Any) -> list[dict[str, Tensor]]:
    """The model's inputs for each of `PROBES`: ids int64 [1, L], pixels where it has a picture."""
    noise = np.random.RandomState(0).randint(0, 256, (64, 96, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    inputs = []
    for turns in PROBES:
        sample = encode({"conversations": turns}, processor)
        ids = torch.tensor([sample.input_ids])
        values = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if sample.images:
            values |= processor.image_processor(images=[picture], return_tensors="pt")
        inputs.append(values)
    return inputs


@torch.inference_mode()
def probe_logits(model: nn.Module, inputs: list[dict[str, Tensor]]) -> Tensor:
    """float32 [tokens of all probes, vocabulary]; pixels take the dtype of the weights."""
    weights = next(model.parameters())
    logits = []
    for values in inputs:
        placed = {
            key: value.to(weights.device, weights.dtype if value.is_floating_point() else None)
            for key, value in values.items()
        }
        logits.append(model(**placed).logits[0].float().cpu())
    return torch.cat(logits)


def compare(
    found: Tensor, expected: Tensor, unchanged: Tensor, *, dtype: torch.dtype, adapter: Path
) -> Difference:
    """How near the merged weights come to base + adapter.

    Args:
        found: logits of the merged weights, read back from disk; float32, as the others.
        expected: of base + adapter.
        unchanged: of the base alone.
        dtype: of the weights.
        adapter: its folder, for the error.

    Raises:
        VltrainError: the merge changed nothing, or its logits are not those of base + adapter.
    """
    size = expected.square().mean().sqrt()
    difference = Difference(
        merged=((found - expected).square().mean().sqrt() / size).item(),
        base=((unchanged - expected).square().mean().sqrt() / size).item(),
    )
    name = str(dtype).removeprefix("torch.")
    if torch.equal(found, unchanged):
        raise VltrainError.at(
            str(adapter),
            what=f"merged in {name} it changes nothing: the weights answer exactly as the base",
            fix="train longer or at a higher learning rate",
        )
    if not difference.merged <= TOLERANCE[dtype]:  # not a number is no pass either
        raise VltrainError.at(
            str(adapter),
            what=f"merged weights differ from base + adapter by {difference.merged:.2%} of the "
            f"logits, {TOLERANCE[dtype]:.2%} is what rounding to {name} explains; nothing was kept",
            fix="look for weights that are not finite: the run's loss in metrics.jsonl tells",
        )
    return difference


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write into; it becomes `out` when the block ends without error.

    What killed processes left beside `out` is removed first.
    """
    for leftover in out.parent.glob(f"{glob.escape(out.name)}.partial-*"):
        if not _is_running(leftover.name.rpartition("-")[2]):
            shutil.rmtree(leftover)
    draft = out.with_name(f"{out.name}.partial-{os.getpid()}")
    draft.mkdir(parents=True)
    try:
        yield draft
        draft.rename(out)
    except BaseException:
        shutil.rmtree(draft)
        raise


def _is_running(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        return True  # somebody else's process
    return True
