"""The `trainer:` section of a recipe: `transformers.TrainingArguments` under its own names.

What a run takes where the recipe leaves it open, and what is not the recipe's to say.
"""

from collections.abc import Iterator
from typing import Any

from vltrain.data_config import BatchConfig, DataConfig
from vltrain.method_config import Method
from vltrain.recipe_types import Fault

TRAINER_DEFAULTS: dict[str, Any] = {
    "num_train_epochs": 5,
    "per_device_train_batch_size": 1,
    "weight_decay": 0.1,
    "adam_beta2": 0.95,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.01,  # below 1: the share of all steps
    "gradient_checkpointing": True,
    "logging_steps": 1,
    "save_steps": 1000,
    "save_total_limit": 10,
    "seed": 42,
    "report_to": "tensorboard",
}
ADAPTER_DEFAULTS: dict[str, Any] = {"learning_rate": 1e-4, "gradient_accumulation_steps": 8}
METHOD_DEFAULTS: dict[Method, dict[str, Any]] = {
    "lora": ADAPTER_DEFAULTS,
    "qlora": ADAPTER_DEFAULTS,
    "full": {"learning_rate": 1e-5, "gradient_accumulation_steps": 16},
}
# Where batch.samples says what a step is, what the Trainer takes for a batch is all of a step.
WHOLE_STEPS = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}

NOT_YOURS_TO_SET = {
    "output_dir": ("the run directory is the recipe's own `output`", "set output instead"),
    "remove_unused_columns": ("columns that the Trainer calls unused hold the pictures", ""),
    "resume_from_checkpoint": ("a run that was cut off resumes by itself", "start it again"),
    "label_smoothing_factor": ("transformers would smooth over labels that are not shifted", ""),
    "do_train": ("the command already says it", ""),
    "do_eval": ("evaluation follows from the data", "give data.eval_files or data.eval_share"),
    "do_predict": ("a run trains; it answers nothing", "use vltrain chat --input"),
    "deepspeed": ("the recipe has a key of its own for it", "set deepspeed: zero2, or engine"),
    "fsdp": ("the engine is the recipe's own `engine`", "set engine: fsdp2"),
    "fsdp_config": ("the engine is the recipe's own `engine`", "set engine: fsdp2"),
    "parallelism_config": ("a run is spread by one of the engines", "set engine or deepspeed"),
}
"""`trainer:` keys that are refused: why, and what to do instead of only leaving the key out."""


def with_defaults(
    trainer: dict[str, Any], method: Method, data: DataConfig, batch: BatchConfig
) -> dict[str, Any]:
    """All `trainer:` values: the method's defaults under what was given.

    What is held out is measured in batches of the training's size, which have been seen to fit,
    after each epoch; with every checkpoint where the best one is to be kept, as
    `TrainingArguments` demands.
    """
    by_samples = {} if batch.samples is None else WHOLE_STEPS
    settings = TRAINER_DEFAULTS | METHOD_DEFAULTS[method] | by_samples | trainer
    settings.setdefault("per_device_eval_batch_size", settings["per_device_train_batch_size"])
    for key in ("save_strategy", "eval_strategy", "logging_strategy"):
        if settings.get(key) is False:  # what YAML makes of a bare `no`
            settings[key] = "no"
    if data.has_eval and "eval_strategy" not in settings:
        # A stream has no epochs.
        as_saved = settings.get("load_best_model_at_end", False) or data.streaming
        settings["eval_strategy"] = settings.get("save_strategy", "steps") if as_saved else "epoch"
        if settings["eval_strategy"] == "steps":
            settings.setdefault("eval_steps", settings["save_steps"])
    return settings


def trainer_faults(trainer: dict[str, Any]) -> Iterator[Fault]:
    """Keys of `trainer:` that a run sets by itself."""
    for key in trainer:
        if key in NOT_YOURS_TO_SET:
            reason, instead = NOT_YOURS_TO_SET[key]
            yield (
                f"trainer.{key}",
                f"`trainer.{key}` cannot be set: {reason}",
                instead or f"take out `trainer.{key}`",
            )
