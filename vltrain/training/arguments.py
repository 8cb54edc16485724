"""The `trainer:` section of a recipe -> `TrainingArguments`, or what is wrong with it."""

import contextlib
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Annotated, Any, get_type_hints

import torch
from annotated_types import Ge
from pydantic import TypeAdapter, ValidationError
from transformers import TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from vltrain.config import Recipe, unknown_key
from vltrain.cores import usable_cores
from vltrain.errors import VltrainError
from vltrain.models.loading import DTYPES, dtype_for_machine
from vltrain.training.engines import NO_ENGINE, Engine, engine_settings
from vltrain.training.processes import local_share
from vltrain.training.trainer import compute_precision

COUNTS = (
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
)
"""`trainer:` keys of which a step needs at least one."""


LOADING_WORKERS = 4  # what the recipes that come along have

ENGINE_SWITCHES = (
    "ACCELERATE_USE_CPU",  # makes DDP of DeepSpeed without a word
    "ACCELERATE_USE_DEEPSPEED",
    "ACCELERATE_USE_FSDP",
    "ACCELERATE_USE_MEGATRON_LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG",
)
"""Variables by which a launcher chooses an engine; the recipe alone does."""


def training_arguments(recipe: Recipe, engine: Engine = NO_ENGINE) -> TrainingArguments:
    """The `trainer:` section as `TrainingArguments`, with what the recipe's other parts imply.

    The processes of a run find each other here. Under ZeRO-3, models that are loaded afterwards
    are shared out while they are read, for as long as the arguments live.

    Raises:
        VltrainError: a key or a value that `TrainingArguments` does not take, or a file of
            DeepSpeed's that contradicts it.
    """
    refuse_wrong_section(recipe.trainer)
    _refuse_fp16_without_gpu(recipe.dtype)
    for switch in ENGINE_SWITCHES:
        os.environ.pop(switch, None)
    implied = {
        "use_cpu": not torch.cuda.is_available(),
        **compute_precision(DTYPES[run_dtype(recipe)]),
        **_implied_optimizer(recipe),
        "logging_nan_inf_filter": False,  # a loss that is not finite must be seen
        "disable_tqdm": True,
        **_implied_copies(recipe.trainer),
        "dataloader_num_workers": loading_workers(recipe.trainer),
        "eval_strategy": "no",
    }
    if recipe.arranges_layers:
        implied["ddp_find_unused_parameters"] = False
    trainer = recipe.trainer | ({"gradient_checkpointing": False} if recipe.arranges_layers else {})
    settings = implied | _current_names(trainer, trainer_keys())
    settings |= engine_settings(engine, compiled=recipe.compile is True)
    try:
        arguments = TrainingArguments(
            output_dir=str(recipe.output), remove_unused_columns=False, **settings
        )
        if engine.name == "deepspeed":
            _join_deepspeed()
        get_reporting_integration_callbacks(arguments.report_to)  # refuses an unknown one
    except (TypeError, ValueError) as error:
        raise VltrainError.at(
            "trainer", what=str(error), fix="see TrainingArguments in transformers' documentation"
        ) from error
    # More cards would make it nn.DataParallel, which parts samples from their pictures.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    _refuse_mismatches(arguments)
    return arguments


def run_dtype(recipe: Recipe) -> str:
    """The dtype of a run's weights: the recipe's, what its method asks for, or the machine's."""
    if recipe.method == "full" and recipe.full.weights in ("residual", "stochastic"):
        return "bf16"
    if recipe.method == "lora" and recipe.lora.weights == "bf16":
        return "bf16"
    return dtype_for_machine(recipe.dtype)


def _implied_optimizer(recipe: Recipe) -> dict[str, str]:
    """Q-LoRA's optimizer: moments of 8 bits that leave a full GPU for the host's memory.

    On a CPU there is nothing to page to.
    """
    if recipe.method != "qlora":
        return {}
    return {"optim": "paged_adamw_8bit" if torch.cuda.is_available() else "adamw_8bit"}


def _implied_copies(trainer: Mapping[str, Any]) -> dict[str, Any]:
    """How batches come to a GPU: from pinned memory, and the host goes on meanwhile."""
    pinned = torch.cuda.is_available() and trainer.get("dataloader_pin_memory", True)
    copies = {"accelerator_config": {"non_blocking": True}} if pinned else {}
    return {"dataloader_pin_memory": pinned, **copies}


def loading_workers(trainer: Mapping[str, Any]) -> int:
    """Processes that open pictures for each process that trains, where a recipe says nothing.

    On a CPU none: they would take the cores from training.
    """
    _, among = local_share()
    spare = min(LOADING_WORKERS, usable_cores() // among - 1)
    implied = max(spare, 0) if torch.cuda.is_available() else 0
    return int(trainer.get("dataloader_num_workers", implied))


def trainer_keys() -> list[str]:
    """The names of all settings of `TrainingArguments`."""
    return [f.name for f in fields(TrainingArguments) if f.init]


def refuse_wrong_section(settings: dict[str, Any]) -> None:
    """Raise VltrainError for keys of the `trainer:` section that nothing knows, and for values that
    are not of their key's type, or count nothing.

    `TrainingArguments` takes a learning rate of "1e-4", a text, and fails after the model is
    loaded.
    """
    known = trainer_keys()
    for key in settings:
        if key not in known:
            raise unknown_key("the recipe", f"trainer.{key}", [f"trainer.{k}" for k in known])
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


def _join_deepspeed() -> None:
    """Show DeepSpeed the processes that have found each other; on a CPU nobody else does.

    Without it, a model that is loaded under ZeRO-3 is shared out among one.
    """
    import deepspeed

    # Sums by way of shared memory on CPUs: compiled for a minute where gloo does without.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    with contextlib.redirect_stdout(io.StringIO()):  # what it prints nobody can act upon
        deepspeed.init_distributed(auto_mpi_discovery=False)


def _refuse_mismatches(arguments: TrainingArguments) -> None:
    """Raise VltrainError where DeepSpeed's file states another value than `trainer:`."""
    config = getattr(arguments, "hf_deepspeed_config", None)
    if config is not None and config.mismatches:
        stated = "; ".join(line.removeprefix("- ") for line in config.mismatches)
        raise VltrainError.at(
            "deepspeed",
            what=f"its file (ds) and the recipe (hf) differ: {stated}",
            fix='write "auto" into the file: the recipe\'s value is then used',
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
    batches = math.ceil(batches / arguments.world_size)  # the last processes take some twice
    per_epoch = max(1, math.ceil(batches / arguments.gradient_accumulation_steps))
    return math.ceil(arguments.num_train_epochs * per_epoch)
