"""What a recipe leaves to the machine: the fast way to take its steps, where that is known to work.

A step learns from the same samples either way. `compile: auto`, `memory: auto` and
`data.packing: auto` stand for it, and are what a recipe has that says nothing.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from math import prod

import torch

from vltrain.config import Recipe
from vltrain.data.step_rows import StepRows
from vltrain.models.adapted import saved_shape
from vltrain.models.layer_runs import compile_fault
from vltrain.models.loss import gpus_have_kernels
from vltrain.trainer_config import WHOLE_STEPS
from vltrain.training.arguments import refuse_wrong_section, run_dtype
from vltrain.training.engines import Engine
from vltrain.training.processes import is_first, local_share
from vltrain.workflows.prepare import compiling_fault
from vltrain.workflows.run_data import Halves, wide_row

logger = logging.getLogger(__name__)

STEP_SIZES = ("gradient_accumulation_steps", "train_batch_size", "train_micro_batch_size_per_gpu")
"""Keys of DeepSpeed's file that say what a step is."""


def settled(
    recipe: Recipe, engine: Engine, *, processes: int = 1, on_gpu: bool | None = None
) -> Recipe:
    """The recipe with what it leaves open decided, but for what the GPU's memory has a say in.

    `memory: auto` stays where the memory is to decide; rows are as long as they may be.

    Args:
        engine: what the run is under.
        processes: of the run.
        on_gpu: whether it is on a GPU; None: where this machine has one, and compiling is then
            tried out.

    Raises:
        VltrainError: the `trainer:` section has what `TrainingArguments` does not take.
    """
    refuse_wrong_section(recipe.trainer)
    there = torch.cuda.is_available() if on_gpu is None else on_gpu
    there = there and not recipe.trainer.get("use_cpu", False)
    compiled = recipe.compile
    if compiled == "auto":
        known = there and recipe.method != "qlora" and not _is_dora(recipe)
        known = known and compiling_fault(engine) is None
        compiled = known and (on_gpu is not None or _compiles_here())
    memory = recipe.memory if there or recipe.memory != "auto" else None
    settled_layers = replace(recipe, compile=compiled, memory=memory)
    # A file of DeepSpeed's that says what a step is would contradict one that is packed.
    said = any(isinstance((engine.config or {}).get(key), int) for key in STEP_SIZES)
    return _with_rows(settled_layers, processes, packs=there and not said, on_gpu=there)


def _compiles_here() -> bool:
    """Whether anything can be compiled for the GPU that this process will have; else it says so."""
    process, _ = local_share()
    fault = compile_fault(torch.device("cuda", process % torch.cuda.device_count()))
    if fault is not None and is_first():
        logger.warning("layers are not compiled, for nothing can be on this machine: %s", fault)
    return fault is None


def _is_dora(recipe: Recipe) -> bool:
    """Whether the adapter is of DoRA, whose layers nobody has measured compiled."""
    continued = recipe.lora.continue_from
    return recipe.lora.dora if continued is None else bool(saved_shape(continued).use_dora)


def _with_rows(recipe: Recipe, processes: int, *, packs: bool, on_gpu: bool) -> Recipe:
    """The recipe with its samples packed, or not, and the length of rows decided."""
    data, batch, trainer = recipe.data, recipe.batch, recipe.trainer
    if data.packing == "auto":
        kernels = gpus_have_kernels() and run_dtype(recipe) != "fp32"
        packs = (packs and kernels) or data.row_tokens != "auto"
        data = replace(data, packing=packs)
        if packs:
            of_a_process = prod(trainer[key] for key in WHOLE_STEPS)
            batch = replace(batch, samples=of_a_process * processes)
            trainer = trainer | WHOLE_STEPS
    if batch.samples is not None and data.row_tokens == "auto":
        # Long rows are for the kernel that a GPU has: elsewhere each token of a row is held
        # against each.
        data = replace(data, row_tokens=wide_row(data) if on_gpu else data.max_length)
    return replace(recipe, data=data, batch=batch, trainer=trainer)


def leaves_rows_open(recipe: Recipe) -> bool:
    """Whether a recipe, as it was written, leaves it to the memory how long rows are."""
    return recipe.data.row_tokens == "auto"


def shorter_rows(recipe: Recipe, halves: Halves | None) -> Iterator[tuple[Recipe, Halves | None]]:
    """A run as it is, and with the samples of a step in shorter and shorter rows.

    Args:
        recipe: settled.
        halves: its data; None where it is not known.
    """
    yield recipe, halves
    if recipe.batch.samples is None:
        return
    tokens, least = recipe.data.row_tokens, recipe.data.max_length
    if halves is not None:
        least = int(max(halves.train.lengths))
    while tokens > least:
        tokens = max(tokens // 2, least)
        shorter = replace(recipe, data=replace(recipe.data, row_tokens=tokens))
        yield shorter, None if halves is None else _in_rows_of(halves, tokens)


def in_rows_of_at_most(halves: Halves, limit: Callable[[int], int]) -> Halves:
    """The data with the samples of a step in rows of the length that `limit` makes of theirs."""
    if not isinstance(halves.rows, StepRows):
        return halves
    tokens = limit(halves.rows.row_tokens)
    return halves if tokens == halves.rows.row_tokens else _in_rows_of(halves, tokens)


def _in_rows_of(halves: Halves, tokens: int) -> Halves:
    assert isinstance(halves.rows, StepRows), "steps of so many samples are packed step by step"
    return replace(halves, rows=halves.rows.of_length(tokens))
