"""The base of a run, and what is known of the run before any weight is read."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PreTrainedConfig, TrainingArguments

from vltrain.config import Recipe
from vltrain.data.dataset import SampleDataset
from vltrain.data.streaming import Split
from vltrain.errors import VltrainError
from vltrain.models.adapted import saved_shape
from vltrain.models.adapters import let_go_of_originals
from vltrain.models.catalog import family_of, read_json
from vltrain.models.census import skeleton, take_census
from vltrain.models.family import Family, FeatureStage
from vltrain.models.features import frozen_stage
from vltrain.models.fp8_weights import refuse_old_gpu, refuse_unfit_widths
from vltrain.models.hub import ResolvedModel, resolve_model
from vltrain.models.loading import DTYPES
from vltrain.models.quantization import Nf4, pack_skeleton
from vltrain.models.sizes import Census, ModelSizes
from vltrain.training.activations import BatchSizes
from vltrain.training.arguments import run_dtype
from vltrain.training.engines import Engine, Machine, choose_engine
from vltrain.training.full_weights import HeldWeights
from vltrain.workflows.features import features_of
from vltrain.workflows.memory import (
    RunMemory,
    assumed_batch,
    fit_layers,
    largest_batch_of,
    load_of,
    work_of,
)
from vltrain.workflows.prepare import hold_weights, let_learn, shape_of
from vltrain.workflows.run_data import Halves, read_data, refuse_foreign_ids
from vltrain.workflows.settle import shorter_rows


@dataclass(frozen=True)
class Base:
    """The checkpoint that a run starts from."""

    source: ResolvedModel
    family: Family
    config: PreTrainedConfig
    processor: Any

    @property
    def vocabulary_size(self) -> int:
        """Rows of the embedding matrix."""
        return self.config.get_text_config().vocab_size

    @property
    def folder(self) -> Path:
        return self.source.path


def read_base(model: str) -> Base:
    """Find the base's folder, its family and its processor; no weight is fetched or read."""
    source = resolve_model(model, weights=False)
    family = family_of(source.path)
    config = family.read_config(read_json(source.path / "config.json"))
    processor = family.read_processor(source.path)
    return Base(source, family, config, processor)


def read_halves(
    console: Console,
    recipe: Recipe,
    base: Base,
    arguments: TrainingArguments,
    processes: int | None = None,
) -> Halves:
    """What this process of a run learns from and is evaluated on, checked.

    Args:
        processes: of the run; None: of this one.

    Raises:
        VltrainError: all that is wrong with the files, or ids that the base does not know.
    """
    halves = read_data(
        console,
        recipe.data,
        base.processor,
        seed=arguments.seed,
        split=Split(
            arguments.train_batch_size,
            arguments.process_index,
            processes or arguments.world_size,
        ),
        vocabulary_size=base.vocabulary_size,
        step_samples=recipe.batch.samples,
    )
    for half in (halves.train, halves.evaluation):
        if isinstance(half, SampleDataset):
            refuse_foreign_ids(half, base.vocabulary_size, base.folder)
    return halves


def refuse_unfit_fp8(recipe: Recipe, base: Base, *, here: bool = True) -> None:
    """Raise VltrainError where the recipe wants fp8 and adapter, base or machine cannot have it.

    Args:
        here: whether the run is for this machine.
    """
    if recipe.lora.base != "fp8":
        return
    continued = recipe.lora.continue_from
    if continued is not None and saved_shape(continued).use_dora:
        raise VltrainError.at(
            "lora.base",
            what=f"does not go with {continued}, which is of DoRA",
            fix="take out lora.base",
        )
    if here:
        refuse_old_gpu()
    refuse_unfit_widths(skeleton(base.family, base.config, DTYPES["bf16"]), base.family)


@dataclass(frozen=True)
class Counted:
    """A run's model, counted before any weight is read."""

    census: Census
    held: HeldWeights | None  # how a full run holds what learns
    stage: FeatureStage | None  # the last on a picture's way up to which nothing learns


def count_run(
    recipe: Recipe, base: Base, gpu_bytes: int | None, engine: Engine | None = None
) -> Counted:
    """Where the parameters of a run lie, which of them learn, and how a full run holds those.

    No weight is read. Layers in fp8 count as the bf16 that they take the bytes of.

    Args:
        gpu_bytes: of the one GPU; None on a CPU, and where processes share the run.
        engine: what the model trains under; None: it is counted as it is before it trains.
    """
    model = skeleton(base.family, base.config, DTYPES[run_dtype(recipe)])
    if recipe.method == "qlora":
        pack_skeleton(model, base.family, Nf4(recipe.quantize.vision))
    learning = let_learn(model, shape_of(recipe), base.family, base.folder, seed=0)
    held = hold_weights(learning, recipe, gpu_bytes)
    stage = frozen_stage(learning, base.family)
    if engine is not None and engine.leaves_model_as_it_is:
        let_go_of_originals(learning)
    return Counted(take_census(learning, base.family), held, stage)


def memory_of(
    recipe: Recipe,
    base: Base,
    arguments: TrainingArguments,
    engine: Engine,
    halves: Halves | None,
    *,
    pictures: int = 1,
    rows_open: bool = False,
    processes: int = 1,
    gpu_bytes: int | None,
    taken: int = 0,
) -> tuple[Halves | None, RunMemory]:
    """A run as far as memory goes, in rows and with layers run as its GPU asks for.

    With `memory: auto` as much of the layers is recomputed; where that does not suffice and rows
    are left open, they are shorter.

    Args:
        recipe: settled.
        halves: the run's data; None where it is not known.
        pictures: in each sample, where no data is known.
        rows_open: whether the recipe leaves the length of rows open.
        gpu_bytes: of each GPU; None where no size is known.
        taken: how many of them other programs hold.

    Returns:
        The data, in rows that fit, and the memory.
    """
    one = gpu_bytes if engine.name == "none" else None
    counted = count_run(recipe, base, one, engine)
    features = features_of(recipe, base.config, counted.stage, engine, arguments, halves)
    sizes, room = base.family.read_sizes(base.config), (gpu_bytes or 0) - taken
    for way, there in shorter_rows(recipe, halves) if rows_open else [(recipe, halves)]:
        work = work_of(way, arguments, engine, processes, counted.held, there)
        run = RunMemory(
            counted.census,
            sizes,
            batch_of(way, sizes, there, arguments, pictures=pictures, processes=processes),
            replace(work, features=features),
            engine,
            held=counted.held,
            whole_steps=recipe.batch.samples is not None,
        )
        if gpu_bytes and recipe.memory == "auto":
            run = fit_layers(run, room)
        if not gpu_bytes or run.estimate.comfortable <= room:
            break
    return there, run


def batch_of(
    recipe: Recipe,
    sizes: ModelSizes,
    halves: Halves | None,
    arguments: TrainingArguments,
    *,
    pictures: int,
    processes: int,
) -> BatchSizes:
    """The largest batch that a process takes at a time, of its data or as the recipe allows it."""
    if halves is None:
        rows = arguments.per_device_train_batch_size
        return assumed_batch(recipe, sizes, pictures, rows, processes)
    return largest_batch_of(recipe, sizes, halves, arguments)


def plan_engine(recipe: Recipe, base: Base, machine: Machine | None = None) -> Engine:
    """The engine that the recipe asks for, or that the model's size calls for on a machine.

    Args:
        machine: default this one, in this process of a run.

    Raises:
        VltrainError: it cannot run here.
    """
    return choose_engine(
        recipe.engine,
        recipe.deepspeed,
        machine or Machine.this(),
        lambda: load_of(count_run(recipe, base, None).census, recipe),
        base.family.layers,
    )
