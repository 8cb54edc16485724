"""Recipe -> run directory: the one path for every method."""

import shutil
from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel, PrinterCallback, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from vltrain.config import Recipe
from vltrain.data.collation import Collator, collate_rows
from vltrain.models.adapters import count_parts, learns_to_see, saved_parameters
from vltrain.models.family import Family
from vltrain.models.fingerprint import weights_hash
from vltrain.models.hub import fetch_weights
from vltrain.models.layer_runs import LayerRuns
from vltrain.models.loading import DTYPES, checkpoint_dtype, load_model
from vltrain.models.pissa import against_base, double_rank, first_weights
from vltrain.models.saving import Origin, save_adapter, save_like, write_origin
from vltrain.models.shares import whole_tensors
from vltrain.training.arguments import run_dtype, step_count, training_arguments
from vltrain.training.callbacks import MetricsLog, ProgressBar
from vltrain.training.checkpoints import checkpoint_step, clear_drafts
from vltrain.training.deepspeed_file import decisions_of_file
from vltrain.training.disk import MASTERS, saved_bytes
from vltrain.training.engines import Engine
from vltrain.training.full_weights import HELD, HeldWeights, bf16_optimizer
from vltrain.training.gradient_check import AdapterGradients
from vltrain.training.learning_rates import rate_of
from vltrain.training.master_adamw import master_optimizer
from vltrain.training.plot import plot_loss
from vltrain.training.processes import is_first, process_count, wait_for_all
from vltrain.training.run_dir import RunDir, environment
from vltrain.training.stopping import StopSignals
from vltrain.training.trainer import Trainer
from vltrain.training.universal import share_count, shared_out_anew
from vltrain.workflows.base import (
    Base,
    plan_engine,
    read_base,
    read_halves,
    refuse_unfit_fp8,
)
from vltrain.workflows.features import keep_features
from vltrain.workflows.guard import (
    advised,
    check_memory,
    data_fingerprint,
    guarded,
    in_steps_of_before,
    on_processes_of_now,
    refuse_changed_data,
    refuse_no_space,
    samples_per_step,
)
from vltrain.workflows.loading_room import fit_workers
from vltrain.workflows.memory import gpu_memory, layers_of
from vltrain.workflows.prepare import (
    decisions,
    hold_weights,
    nf4_of,
    prepare_model,
    refuse_unfit_base,
    refuse_unfit_engine,
)
from vltrain.workflows.quiet import hide_weight_bars
from vltrain.workflows.run_data import Halves, plan_of
from vltrain.workflows.settle import leaves_rows_open, settled


def train(recipe: Recipe, console: Console | None = None) -> None:
    """Run a recipe to its end: its directory then holds the final adapter or model.

    A run that was cut off goes on from its last whole checkpoint; a finished one is left alone.

    Raises:
        VltrainError: everything about recipe, data and base that would make the run fail or
            learn something wrong, before the model is loaded.
    """
    console = console or Console(quiet=not is_first())
    hide_weight_bars()
    run = RunDir(recipe.output)
    if run.state(recipe) == "finished":
        console.print(
            f"{recipe.output} is finished: its weights are in {run.final}", soft_wrap=True
        )
        return
    with guarded(run) as signals:
        _train(recipe, run, signals, console)


def _train(recipe: Recipe, run: RunDir, signals: StopSignals, console: Console) -> None:
    base = read_base(recipe.model)
    refuse_unfit_base(recipe, base.folder)
    refuse_unfit_fp8(recipe, base)
    engine = plan_engine(recipe, base)
    refuse_unfit_engine(recipe, engine)
    engine = on_processes_of_now(engine, run, process_count())
    asked = recipe
    in_steps = in_steps_of_before(asked, run, process_count())
    recipe = settled(in_steps, engine, processes=process_count())
    arguments = training_arguments(recipe, engine)  # before any model is loaded
    halves = read_halves(console, recipe, base, arguments)
    halves, memory = check_memory(
        console, recipe, base, halves, arguments, engine, rows_open=leaves_rows_open(asked)
    )
    layers = layers_of(recipe, engine, memory)
    if fewer := fit_workers(arguments, halves):
        console.print(fewer, soft_wrap=True)
    fingerprint = data_fingerprint(recipe.data, halves.train, run.read_data_fingerprint())
    refuse_changed_data(run, fingerprint)
    with arguments.main_process_first():
        fetch_weights(base.source)
    model = prepare_model(
        recipe, base.family, base.folder, device=arguments.device, seed=arguments.seed
    )
    held = hold_weights(model, recipe, memory_of_one(engine))
    first = first_weights(model) if recipe.lora.start == "pissa" else None
    refuse_no_space(
        run,
        saved_bytes(model, engine.name, saved_states(recipe, arguments, held)),
        arguments,
        halves,
    )
    if engine.name != "none":
        let_ranks_meet(model, base.family, engine, halves)
    origin = begin(run, asked, base, engine, halves) if is_first() else None
    if origin is not None:
        step = samples_per_step(recipe, process_count())
        run.keep_data_fingerprint({**fingerprint, "samples_per_step": step})
    wait_for_all()
    show_plan(console, recipe, base, model, halves, arguments, engine)
    for line in decisions(recipe, base.family, base.folder, held):
        console.print(line, soft_wrap=True)
    with advised(recipe, memory):
        keep_features(console, recipe, base.family, model, halves, arguments, engine)
        fit(console, run, signals, recipe, model, base, halves, arguments, engine, held, layers)
    tensors = final_tensors(model, recipe, base)
    if origin is not None:
        if first is not None:
            tensors = against_base(tensors, first)
            double_rank(model.peft_config["default"])
        save_final(run, model, tensors, origin)
        plot_loss(run.read_metrics(), run.loss_plot)
        run.mark_finished()
    wait_for_all()
    console.print(f"done: {run.final}; the loss is drawn in {run.loss_plot}", soft_wrap=True)


def begin(run: RunDir, recipe: Recipe, base: Base, engine: Engine, halves: Halves) -> Origin:
    """Take the run's directory; the base, with its weights' hash, as results name it."""
    origin = Origin(
        base.source.name,
        base.source.path,
        base.source.revision,
        weights_hash(base.folder),
        nf4=nf4_of(recipe, base.folder),
    )
    run.begin(
        recipe,
        environment(
            dtype=run_dtype(recipe),
            base=origin.as_json(),
            engine=engine.name,
            zero_stage=engine.zero_stage,
            world_size=process_count(),
            epoch=halves.epoch,
        ),
    )
    return origin


def let_ranks_meet(
    model: PreTrainedModel | PeftModel, family: Family, engine: Engine, halves: Halves
) -> None:
    """Run the vision side in batches without pictures too, where other processes wait for it."""
    if learns_to_see(model, family) or (halves.shows_pictures and engine.shards_weights):
        family.see_always(model.get_base_model() if isinstance(model, PeftModel) else model)


def memory_of_one(engine: Engine) -> int | None:
    """Bytes of the GPU where a run has one to itself."""
    return gpu_memory() if engine.name == "none" else None


def show_plan(
    console: Console,
    recipe: Recipe,
    base: Base,
    model: PreTrainedModel | PeftModel,
    halves: Halves,
    arguments: TrainingArguments,
    engine: Engine,
) -> None:
    """What will be learned, from what, in how many steps, on what."""
    heading = f"{recipe.method} · {base.source.name} · {base.family.name}"
    console.print(Text(heading, "bold"), soft_wrap=True)
    parts = Table()
    for title in ("part", "learned", "of"):
        parts.add_column(title, justify="left" if title == "part" else "right")
    counts = count_parts(model, base.family)
    for part, count in counts.items():
        parts.add_row(part, f"{count.learned:,}", f"{count.total:,}")
    learned = sum(count.learned for count in counts.values())
    parts.add_row("all", f"{learned:,}", f"{sum(c.total for c in counts.values()):,}", style="bold")
    console.print(parts)
    for line in plan_of(halves):
        console.print(line, soft_wrap=True)
    units, noun = halves.epoch_units
    step = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    step *= process_count()
    if recipe.batch.samples is not None:
        step, noun = recipe.batch.samples, "samples"
    console.print(
        f"{step_count(arguments, units):,} steps of {step:,} {noun}, "
        f"weights in {run_dtype(recipe)}, on {arguments.device}"
    )
    if engine.name != "none":
        console.print(
            f"{process_count()} processes under {engine}: {engine.reason}", soft_wrap=True
        )
        on_cpu = arguments.device.type == "cpu"
        for line in decisions_of_file(engine.config or {}, cpu=on_cpu):
            console.print(line, soft_wrap=True)


def fit(
    console: Console,
    run: RunDir,
    signals: StopSignals,
    recipe: Recipe,
    model: PreTrainedModel | PeftModel,
    base: Base,
    halves: Halves,
    arguments: TrainingArguments,
    engine: Engine,
    held: HeldWeights | None,
    layers: LayerRuns | None,
) -> None:
    """Train, from the last whole checkpoint if there is one."""
    checkpoint = run.last_checkpoint()
    if is_first():
        run.cut_metrics(0 if checkpoint is None else checkpoint_step(checkpoint))
    if checkpoint is not None:
        console.print(f"resuming from {checkpoint}", soft_wrap=True)
    source = None if checkpoint is None else str(checkpoint)
    if checkpoint is not None and engine.reads_any_number:
        shares, own = share_count(checkpoint), process_count()
        console.print(f"its {shares} shares are shared out anew among {own}", soft_wrap=True)
        source = str(shared_out_anew(checkpoint))
    progress = ProgressBar(console)
    collator = Collator(base.processor.pad_id)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=halves.train if halves.rows is None else halves.rows,
        eval_dataset=halves.evaluation,
        data_collator=collator if halves.rows is None else collate_rows,
        mix=halves.mix,
        eval_collator=collator,
        engine=engine,
        stop_requested=signals.requested,
        stop_after_nonfinite=recipe.stop_after_nonfinite,
        callbacks=[MetricsLog(run.append_metrics), progress, AdapterGradients()],
        optimizer_cls_and_kwargs=optimizer_of(recipe, arguments, held),
        rate=rate_of(
            base.family, recipe.lr, default=arguments.learning_rate, plus=recipe.lora.plus
        ),
        layers=layers,
    )
    trainer.remove_callback(PrinterCallback)
    try:
        with signals.noted():
            trainer.train(resume_from_checkpoint=source)
        trainer.widen_masters()
    finally:
        progress.bar.stop()  # or a run that breaks off leaves the terminal without a cursor
    if is_first():
        clear_drafts(run.path)


def saved_states(recipe: Recipe, arguments: TrainingArguments, held: HeldWeights | None) -> str:
    """The optimizer of a run, by a name that `saved_bytes` knows."""
    if held in HELD:
        return "adamw_8bit"
    return str(arguments.optim) if optimizer_of(recipe, arguments, held) is None else MASTERS


def optimizer_of(
    recipe: Recipe, arguments: TrainingArguments, held: HeldWeights | None
) -> tuple[type, dict[str, Any]] | None:
    """The optimizer of weights in bf16, with its settings; None: the arguments name another."""
    if held in HELD:
        return bf16_optimizer(arguments, held)
    if recipe.method == "lora" and recipe.lora.weights == "bf16":
        return master_optimizer(arguments)
    return None


def final_tensors(
    model: PreTrainedModel | PeftModel, recipe: Recipe, base: Base
) -> dict[str, torch.Tensor]:
    """What a run has made, put together from all processes; {} in all but the first.

    Of an adapter what has learned, in the dtype that it learns in; of a model all of it, in its
    checkpoint's dtype and by its published names. What did not learn is the base's to the bit: a
    run in a narrower dtype has rounded it, so it is read again then.
    """
    if isinstance(model, PeftModel):
        return whole_tensors(saved_parameters(model), keep=is_first())
    parameters = list(model.named_parameters())
    learned = [(name, p) for name, p in parameters if p.requires_grad]
    dtype = checkpoint_dtype(base.folder)
    rounded = DTYPES[run_dtype(recipe)] not in (dtype, torch.float32)
    tensors = whole_tensors(learned if rounded else parameters, keep=is_first())
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    if rounded and is_first():
        unset_hf_deepspeed_config()  # under ZeRO-3 this model would be shared out as well
        original = load_model(base.folder).named_parameters()
        tensors = {name: p.detach() for name, p in original} | tensors
    return tensors


def save_final(
    run: RunDir,
    model: PreTrainedModel | PeftModel,
    tensors: Mapping[str, torch.Tensor],
    origin: Origin,
) -> None:
    """Write the adapter, or the whole model in the base's layout, as a draft."""
    shutil.rmtree(run.final_draft, ignore_errors=True)
    run.final_draft.mkdir()
    if isinstance(model, PeftModel):
        save_adapter(model, origin, run.final_draft, tensors)
    else:
        save_like(origin.path, tensors, run.final_draft)
        write_origin(origin, run.final_draft)
