"""What a DeepSpeed file decides in the recipe's place: its `optimizer` and its `scheduler`."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from vltrain.config import Recipe
from vltrain.errors import VltrainError

TORCH_HAS = ("adam", "adamw")  # optimizers that DeepSpeed takes from torch where it is told to


def for_cpu(config: Mapping[str, Any]) -> dict[str, Any]:
    """A file's settings with torch's own AdamW: DeepSpeed would compile one, for a minute.

    Raises:
        VltrainError: the file's optimizer is another one, whose kernels are for GPUs.
    """
    config = copy.deepcopy(dict(config))
    optimizer = config.get("optimizer")
    if optimizer is not None:
        if str(optimizer.get("type")).lower() not in TORCH_HAS:
            raise VltrainError.at(
                "deepspeed",
                what=f"its file's optimizer is {optimizer.get('type')}, and this is a CPU",
                fix="on CPUs take AdamW, or leave `optimizer` out: the recipe's is used",
            )
        optimizer["params"] = {**optimizer.get("params", {}), "torch_adam": True}
        config["zero_force_ds_cpu_optimizer"] = False  # or offloading would insist on its own
    return config


def decisions_of_file(config: Mapping[str, Any], *, cpu: bool) -> Iterator[str]:
    """What a run should say of settings that come from the file, not from the recipe."""
    optimizer, scheduler = config.get("optimizer"), config.get("scheduler")
    if optimizer is not None:
        kind = f"torch's {optimizer['type']}, on a CPU" if cpu else optimizer["type"]
        yield f"the optimizer is the DeepSpeed file's: {kind}; it decays every weight alike"
    if scheduler is not None:
        yield (
            f"the learning rate follows the DeepSpeed file's {scheduler['type']}, "
            "not trainer.lr_scheduler_type"
        )


def refuse_file_against_recipe(recipe: Recipe, config: Mapping[str, Any]) -> None:
    """Raise VltrainError for what a recipe asks and the file would quietly undo."""
    sections = [name for name in ("optimizer", "scheduler") if config.get(name) is not None]
    if not sections:
        return
    undone = [name for name, rate in vars(recipe.lr).items() if rate is not None]
    undone = [f"lr.{name}" for name in undone]
    if recipe.lora.plus is not None:
        undone.append("lora.plus")
    if "optimizer" in sections and not _is_adamw(recipe.trainer.get("optim", "adamw_torch")):
        undone.append("trainer.optim")
    if undone:
        said = " and ".join(f"`{name}`" for name in sections)
        raise VltrainError.at(
            ", ".join(undone),
            what=f"the DeepSpeed file's {said} would be used in its place",
            fix=f"take {said} out of the file, or {', '.join(undone)} out of the recipe",
        )


def _is_adamw(optim: Any) -> bool:
    return str(optim) in ("adamw_torch", "adamw_torch_fused")
