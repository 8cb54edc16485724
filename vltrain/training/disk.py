"""Whether a run's checkpoints will fit on its disk: arithmetic, before a step is taken."""

import math
import shutil
from dataclasses import dataclass
from pathlib import Path

from peft import PeftModel
from torch import nn
from transformers import TrainingArguments

from vltrain.errors import VltrainError
from vltrain.models.shares import element_count
from vltrain.training.checkpoints import checkpoints

MASTERS = "masters"
"""Stands for the optimizer of bfloat16 weights that are saved from its float32 ones."""

STATE_BYTES = ((MASTERS, 12), ("8bit", 2), ("4bit", 1), ("adafactor", 0), ("sgd", 0), ("", 8))
"""Bytes that an optimizer keeps for each learned weight, by a part of its name; Adam's two
averages in float32 where no other part fits."""


@dataclass(frozen=True)
class SavedBytes:
    """What a run saves."""

    weights: int  # of a checkpoint; the final ones are as large
    optimizer: int  # of a checkpoint

    @property
    def checkpoint(self) -> int:
        return self.weights + self.optimizer


def saved_bytes(model: nn.Module, engine: str, optimizer: str) -> SavedBytes:
    """What a model's checkpoints will hold, but for some kilobytes.

    Args:
        model: of an adapter, what learns is saved; of another model, all.
        engine: DeepSpeed saves what learns once more, and in float32 again with the
            optimizer's state.
        optimizer: `TrainingArguments`' name of it, or `MASTERS`.
    """
    learned = [p for p in model.parameters() if p.requires_grad]
    saved = learned if isinstance(model, PeftModel) else list(model.parameters())
    weights = sum(
        element_count(p) * (4 if optimizer == MASTERS else p.element_size()) for p in saved
    )
    state = next(size for part, size in STATE_BYTES if part in optimizer)
    if engine == "deepspeed":
        return SavedBytes(weights, weights + sum(map(element_count, learned)) * (4 + state))
    return SavedBytes(weights, sum(map(element_count, learned)) * state)


def save_count(arguments: TrainingArguments, steps: int) -> int:
    """How many checkpoints a run of so many steps writes, if nothing interrupts it."""
    if arguments.save_strategy == "epoch":
        return math.ceil(arguments.num_train_epochs)
    if arguments.save_strategy != "steps":
        return 1
    interval = arguments.save_steps  # below 1: a share of all steps
    return math.ceil(steps / (interval if interval >= 1 else math.ceil(steps * interval)))


def refuse_small_disk(run: Path, size: SavedBytes, *, keep: int | None, saves: int) -> None:
    """Raise VltrainError where a run's checkpoints and final weights will not fit on the disk.

    Args:
        run: its directory, which need not be there; checkpoints that are count as space.
        size: of one checkpoint.
        keep: how many stay, None or 0: all; each is written before an older one is deleted.
        saves: how many will be written.
    """
    there = next(folder for folder in (run, *run.absolute().parents) if folder.exists())
    used = sum(f.stat().st_size for c in checkpoints(run) for f in c.rglob("*") if f.is_file())
    space = shutil.disk_usage(there).free + used
    kept = min(keep or saves, saves)
    at_once = kept + (saves > kept)
    if at_once * size.checkpoint + size.weights <= space:
        return
    possible = (space - size.weights) // max(1, size.checkpoint) - 1
    lower = f"lower trainer.save_total_limit to {possible}, " if possible >= 1 else ""
    raise VltrainError.at(
        str(run),
        what=f"{at_once} checkpoints of {size_in_words(size.checkpoint)} and final weights of "
        f"{size_in_words(size.weights)} do not fit: {size_in_words(space)} are free",
        fix=f"{lower}make space, or give another --output",
    )


def size_in_words(size: int) -> str:
    """Bytes as a message has them."""
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"
