"""The `trainer:` section of a recipe -> `TrainingArguments`, or what is wrong with it."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import fields
from typing import Annotated, Any, get_type_hints

import torch
from annotated_types import Ge
from pydantic import TypeAdapter, ValidationError
from transformers import TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from vltrain.config import Recipe, unknown_key
from vltrain.errors import VltrainError
from vltrain.models.loading import DTYPES, dtype_for_machine
from vltrain.training.trainer import compute_precision

COUNTS = (
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
)
"""`trainer:` keys of which a step needs at least one."""


def training_arguments(recipe: Recipe) -> TrainingArguments:
    """The `trainer:` section as `TrainingArguments`, with what the recipe's other parts imply.

    Raises:
        VltrainError: a key or a value that `TrainingArguments` does not take.
    """
    known = [f.name for f in fields(TrainingArguments) if f.init]
    for key in recipe.trainer:
        if key not in known:
            raise unknown_key("the recipe", f"trainer.{key}", [f"trainer.{k}" for k in known])
    _refuse_wrong_types(recipe.trainer)
    _refuse_fp16_without_gpu(recipe.dtype)
    _refuse_several_processes()
    implied = {
        "use_cpu": not torch.cuda.is_available(),
        **compute_precision(DTYPES[dtype_for_machine(recipe.dtype)]),
        "logging_nan_inf_filter": False,  # a loss that is not finite must be seen
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "eval_strategy": "no",
    }
    settings = implied | _current_names(recipe.trainer, known)
    try:
        arguments = TrainingArguments(
            output_dir=str(recipe.output), remove_unused_columns=False, **settings
        )
        get_reporting_integration_callbacks(arguments.report_to)  # refuses an unknown one
    except (TypeError, ValueError) as error:
        raise VltrainError.at(
            "trainer", what=str(error), fix="see TrainingArguments in transformers' documentation"
        ) from error
    # More cards would make it nn.DataParallel, which parts samples from their pictures.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _refuse_wrong_types(settings: dict[str, Any]) -> None:
    """Raise VltrainError for values that are not of their key's type, or count nothing.

    `TrainingArguments` takes a learning rate of "1e-4", a text, and fails after the model is
    loaded.
    """
    hints = get_type_hints(TrainingArguments) | dict.fromkeys(COUNTS, Annotated[int, Ge(1)])
    problems = []
    for key, value in settings.items():
        try:
            TypeAdapter(hints[key]).validate_python(value, strict=True)
        except ValidationError as error:
            wanted = dict.fromkeys(finding["msg"] for finding in error.errors())
            problems.append(
                VltrainError.at(
                    "the recipe",
                    what=f"`trainer.{key}` is {json.dumps(value, default=str)}",
                    fix="it " + ", or ".join(m.removeprefix("Input ") for m in wanted),
                )
            )
    if problems:
        raise VltrainError("\n".join(str(problem) for problem in problems))


def _refuse_fp16_without_gpu(dtype: str) -> None:
    if dtype == "fp16" and not torch.cuda.is_available():
        raise VltrainError.at(
            "dtype", what="fp16 trains on a GPU only, and there is none", fix="use bf16 or fp32"
        )


def _refuse_several_processes() -> None:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1 and "LOCAL_RANK" in os.environ:  # as torchrun sets them
        raise VltrainError.at(
            "torchrun",
            what=f"{processes} processes were started, and a run is one",
            fix="start the command by itself",
        )


def _current_names(settings: dict[str, Any], known: Sequence[str]) -> dict[str, Any]:
    """Gradient checkpointing under the name that the installed transformers does not warn of."""
    if "activation_checkpointing" not in known:
        return settings
    return {
        key.replace("gradient_checkpointing", "activation_checkpointing"): value
        for key, value in settings.items()
    }


def step_count(arguments: TrainingArguments, samples: int) -> int:
    """Optimizer steps of the whole run; `samples` are rows where they are packed."""
    if arguments.max_steps > 0:
        return arguments.max_steps
    batches = samples / arguments.per_device_train_batch_size
    batches = math.floor(batches) if arguments.dataloader_drop_last else math.ceil(batches)
    per_epoch = max(1, math.ceil(batches / arguments.gradient_accumulation_steps))
    return math.ceil(arguments.num_train_epochs * per_epoch)
