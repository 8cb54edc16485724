"""Memory and time of a run before it is started: `vltrain estimate`."""

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from rich.text import Text
from transformers import PreTrainedModel

from vltrain.config import Method, Recipe, load_recipe
from vltrain.data.collation import Collator, collate_rows
from vltrain.errors import VltrainError
from vltrain.models.attention import attend_packed
from vltrain.models.layer_runs import LayerRuns
from vltrain.models.loading import DTYPES
from vltrain.models.quantization import Nf4
from vltrain.models.random_weights import random_in_nf4
from vltrain.recipe_yaml import read_yaml
from vltrain.training.arguments import run_dtype, step_count, training_arguments
from vltrain.training.engines import Engine, Machine
from vltrain.training.memory import GIB
from vltrain.training.profiling import measure
from vltrain.workflows.base import (
    Base,
    memory_of,
    plan_engine,
    read_base,
    read_halves,
    refuse_unfit_fp8,
)
from vltrain.workflows.memory import (
    RunMemory,
    gpu_memory,
    layers_of,
    parts,
    show_memory,
)
from vltrain.workflows.prepare import (
    decisions,
    hold_base,
    hold_weights,
    let_learn,
    refuse_unfit_base,
    refuse_unfit_engine,
    shape_of,
)
from vltrain.workflows.quiet import hide_weight_bars
from vltrain.workflows.run_data import Halves
from vltrain.workflows.settle import leaves_rows_open, settled
from vltrain.workflows.train import optimizer_of

NOT_GIVEN = Path("not given")  # stands for the output, and for data that an estimate does without
WARMUP_STEPS, MEASURED_STEPS = 1, 3


@dataclass(frozen=True)
class EpochTime:
    """How long an epoch takes, by the steps that were measured."""

    seconds_per_step: float
    steps: int  # of an epoch

    @property
    def seconds(self) -> float:
        return self.seconds_per_step * self.steps


def estimate_run(
    recipe_file: Path | None,
    *,
    method: Method | None = None,
    model: str | None = None,
    data: Sequence[Path] = (),
    overrides: Sequence[str] = (),
    pictures: int = 1,
    memory_gib: float | None = None,
    gpus: int = 1,
    probe: bool = True,
    as_json: bool = False,
) -> None:
    """Print the memory that a run will take on its GPU, the batch that fits, and an epoch's time.

    The base's `config.json` and tokenizer are read; none of its weights is.

    Args:
        recipe_file, method, model, data, overrides: as for a run; the output may be missing, and
            the data: samples are then assumed to be as long as `data.max_length` allows.
        pictures: in each sample, where no data is given.
        memory_gib: of the GPU that the run is for; None: the one that is there.
        gpus: of the run; the memory is that of each.
        probe: measure some steps where a GPU is there, on random weights.
        as_json: print one JSON object instead of text.

    Raises:
        VltrainError: what would also stop the run before the model is loaded, except for memory.
    """
    hide_weight_bars()
    console = Console(stderr=as_json)
    recipe = draft(recipe_file, method=method, model=model, data=data, overrides=overrides)
    rows_open = leaves_rows_open(recipe)
    recipe = intended(recipe)
    base = read_base(recipe.model)
    refuse_unfit_base(recipe, base.folder)
    refuse_unfit_fp8(recipe, base, here=memory_gib is None)
    gpu_bytes = gpu_memory() if memory_gib is None else round(memory_gib * GIB)
    engine = engine_of(recipe, base, gpus, gpu_bytes)
    on_gpu = None if torch.cuda.is_available() else True  # else the run is for another machine
    recipe = settled(recipe, engine, processes=gpus, on_gpu=on_gpu)
    arguments = training_arguments(recipe)
    known = recipe.data.files != (NOT_GIVEN,)
    halves, run = memory_of(
        recipe,
        base,
        arguments,
        engine,
        read_halves(console, recipe, base, arguments, gpus) if known else None,
        pictures=pictures,
        rows_open=rows_open,
        processes=gpus,
        gpu_bytes=gpu_bytes,
    )
    epoch = None
    if probe and halves is not None and can_be_probed(run, halves, gpus):
        epoch = probe_epoch(recipe, base, halves, layers_of(recipe, run.engine, run))
    if as_json:
        print(json.dumps(as_object(recipe, run, gpu_bytes, epoch)))
        return
    console.print(Text(f"{recipe.method} · {base.source.name} · {base.family.name}", "bold"))
    for line in decided(recipe, base, run):
        console.print(line, soft_wrap=True)
    show_memory(console, run, gpu_bytes)
    console.print(_time_line(epoch, halves, gpus, probe=probe), soft_wrap=True)


def can_be_probed(run: RunMemory, halves: Halves, gpus: int) -> bool:
    """Whether an epoch of the data has steps, and this machine can run them as the run would."""
    there = gpu_memory()
    fits = there is not None and run.estimate.needed <= there
    return fits and gpus == 1 and halves.epoch_units[0] > 0


def draft(
    recipe_file: Path | None,
    *,
    method: Method | None,
    model: str | None,
    data: Sequence[Path],
    overrides: Sequence[str],
    needs_data: bool = False,
) -> Recipe:
    """A recipe whose method is the file's where no other is asked for, else lora.

    Output may be missing, and data unless they are needed: `NOT_GIVEN` stands for them.

    Raises:
        VltrainError: as `load_recipe`.
    """
    values = read_yaml(recipe_file) if recipe_file else {}
    given = {override.partition("=")[0].strip() for override in overrides}
    in_file = values.get("data")
    has_data = isinstance(in_file, dict) and in_file.get("files")
    if not (needs_data or data or has_data or given & {"data", "data.files"}):
        data = (NOT_GIVEN,)
    return load_recipe(
        recipe_file,
        method=method or values.get("method") or "lora",
        model=model,
        data=data,
        output=None if "output" in given or values.get("output") else NOT_GIVEN,
        overrides=overrides,
    )


def decided(recipe: Recipe, base: Base, run: RunMemory) -> Iterator[str]:
    """What the recipe leaves open and a run would decide, in words."""
    yield from decisions(recipe, base.family, base.folder, run.held)
    if recipe.batch.samples is not None:
        yield (
            f"the {recipe.batch.samples:,} samples of each step are packed into rows of up to "
            f"{run.batch.row_tokens:,} tokens"
        )
    if run.work.features is not None:
        yield "pictures: their features are kept, and computed before the first step"
    yield from run.decisions


def engine_of(recipe: Recipe, base: Base, gpus: int, gpu_bytes: int | None) -> Engine:
    """What a run would be under on some GPUs.

    Raises:
        VltrainError: the recipe's engine cannot run there, or the choice of one needs the size
            of the GPUs.
    """
    if gpus > 1 and gpu_bytes is None:
        raise VltrainError.at(
            "--gpus",
            what="what shares the model out depends on the GPUs' memory, and there is none here",
            fix="give it as well: --memory-gib 80",
        )
    machine = Machine(gpus, grouped=gpus > 1 or recipe.needs_processes, gpu_bytes=gpu_bytes)
    engine = plan_engine(recipe, base, machine)
    refuse_unfit_engine(recipe, engine)
    return engine


def intended(recipe: Recipe) -> Recipe:
    """The recipe with what it would have on a GPU, whatever this machine is.

    `auto` is bf16 there, and Q-LoRA's moments can be paged. fp16 is the same to memory as bf16, and
    cannot be asked for without a GPU.
    """
    trainer = recipe.trainer
    if recipe.method == "qlora":
        trainer = {"optim": "paged_adamw_8bit"} | trainer
    dtype = "fp32" if recipe.dtype == "fp32" else "bf16"
    return replace(recipe, dtype=dtype, trainer=trainer)


def probe_epoch(
    recipe: Recipe, base: Base, halves: Halves, layers: LayerRuns | None = None
) -> EpochTime:
    """Train some steps of the recipe on the GPU, on random weights of the base's shape."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = training_arguments(probe_recipe(recipe, Path(folder)))
        model = random_model(recipe, base, seed=arguments.seed)
        measured = measure(
            model,
            arguments,
            halves.train if halves.rows is None else halves.rows,
            Collator(base.processor.pad_id) if halves.rows is None else collate_rows,
            halves.mix,
            layers,
            optimizer_of(recipe, arguments, hold_weights(model, recipe, gpu_memory())),
        )
    return EpochTime(measured.seconds_per_step(WARMUP_STEPS), epoch_steps(recipe, halves))


def probe_recipe(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe of a few steps that leave nothing behind."""
    quiet = {
        "max_steps": WARMUP_STEPS + MEASURED_STEPS,
        "save_strategy": "no",
        "eval_strategy": "no",
        "load_best_model_at_end": False,
        "logging_strategy": "no",
        "report_to": "none",
    }
    return replace(recipe, output=folder, trainer=recipe.trainer | quiet)


def random_model(recipe: Recipe, base: Base, *, seed: int) -> PreTrainedModel | PeftModel:
    """The base with random weights, made on the GPU where there is one, ready to learn."""
    torch.manual_seed(seed)
    dtype = DTYPES[run_dtype(recipe)]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if recipe.method == "qlora":
        nf4 = Nf4(recipe.quantize.vision)
        model = random_in_nf4(base.family, base.config, nf4, dtype, device)
    else:
        torch.set_default_dtype(dtype)
        try:
            with device:
                model = base.family.model_class(base.config)
        finally:
            torch.set_default_dtype(torch.float32)
    model.config.use_cache = False
    if recipe.data.packs:
        attend_packed(model)
    learning = let_learn(model, shape_of(recipe), base.family, base.folder, seed=seed)
    hold_base(learning, recipe, base.family)
    hold_weights(learning, recipe, gpu_memory())
    return learning


def epoch_steps(recipe: Recipe, halves: Halves) -> int:
    """Optimizer steps of one epoch."""
    one = {"max_steps": -1, "num_train_epochs": 1}
    arguments = training_arguments(replace(recipe, trainer=recipe.trainer | one))
    return step_count(arguments, halves.epoch_units[0])


def as_object(
    recipe: Recipe, run: RunMemory, gpu_bytes: int | None, epoch: EpochTime | None
) -> dict[str, Any]:
    """The estimate as `--json` prints it; sizes in bytes, times in seconds."""
    memory = run.estimate
    return {
        "method": recipe.method,
        "model": recipe.model,
        "dtype": recipe.dtype,
        "batch": asdict(run.batch),
        "parts": dict(parts(memory)),
        "peak_in": memory.peak.name,
        "allocated_bytes": memory.total,
        "needed_bytes": memory.needed,
        "host_bytes": memory.off_gpu,
        "gpu_bytes": gpu_bytes,
        "fits": None if gpu_bytes is None else memory.needed <= gpu_bytes,
        "largest_batch": None
        if gpu_bytes is None or run.whole_steps
        else run.largest_batch(gpu_bytes),
        "seconds_per_step": None if epoch is None else epoch.seconds_per_step,
        "steps_per_epoch": None if epoch is None else epoch.steps,
        "seconds_per_epoch": None if epoch is None else epoch.seconds,
    }


def _time_line(epoch: EpochTime | None, halves: Halves | None, gpus: int, *, probe: bool) -> str:
    """An epoch's time, or what is missing to say it."""
    if epoch is not None:
        return (
            f"an epoch takes about {_duration(epoch.seconds)}: {epoch.steps:,} steps of "
            f"{epoch.seconds_per_step:.2f} s, as {MEASURED_STEPS} took that were measured"
        )
    if not torch.cuda.is_available():
        return "time: it is measured, on a GPU, and there is none here"
    if halves is None:
        return "time: it is measured, on the data, and none is given"
    if not halves.epoch_units[0]:
        return "time: what is streamed has no epoch"
    if gpus > 1:
        return "time: it is measured on one GPU, and these are several"
    if probe:
        return "time: it is measured, and the run does not fit the GPU that is here"
    return "time: not measured, as --no-probe asks"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
