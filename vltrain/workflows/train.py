"""Recipe -> run directory: the one path for every method."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedConfig, PreTrainedModel, PrinterCallback, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from vltrain.config import DataConfig, Recipe
from vltrain.data.checks import check_files
from vltrain.data.collation import Collator, collate_rows
from vltrain.data.dataset import SampleDataset, split_records
from vltrain.data.findings import Report
from vltrain.data.mixing import Mix, mix_of
from vltrain.data.packing import PackedDataset
from vltrain.data.pictures import BadPictures, pictures_of
from vltrain.data.records import Record
from vltrain.data.sources import read_records
from vltrain.errors import VltrainError
from vltrain.models.adapters import (
    Adapter,
    add_lora,
    count_parts,
    learns_to_see,
    refuse_impossible,
    set_learned,
)
from vltrain.models.attention import attend_packed
from vltrain.models.catalog import family_of, is_chat_tuned, read_json
from vltrain.models.family import Family
from vltrain.models.fingerprint import weights_hash
from vltrain.models.hub import ResolvedModel, fetch_weights, resolve_model
from vltrain.models.loading import (
    DTYPES,
    checkpoint_dtype,
    dtype_for_machine,
    foreign_id_error,
    load_model,
)
from vltrain.models.saving import Origin, save_adapter, save_like, write_origin
from vltrain.models.shares import whole_tensors
from vltrain.training.arguments import step_count, training_arguments
from vltrain.training.callbacks import MetricsLog, ProgressBar
from vltrain.training.engines import Engine, Load, Machine, choose_engine
from vltrain.training.plot import plot_loss
from vltrain.training.processes import is_first, process_count, wait_for_all
from vltrain.training.run_dir import RunDir, checkpoint_step, environment
from vltrain.training.trainer import Trainer
from vltrain.workflows.inspect import print_report, refuse_errors
from vltrain.workflows.quiet import hide_weight_bars


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


@dataclass(frozen=True)
class Halves:
    """What is learned from and, where a recipe asks for it, what is evaluated on."""

    train: SampleDataset
    evaluation: SampleDataset | None  # never packed: its loss compares with that of any run
    mix: Mix | None = None  # what an epoch shows of `train`; None: each sample once
    rows: PackedDataset | None = None  # the samples of an epoch, where the recipe packs them
    dropped: int = 0  # records that were left out: too long, or with a bad picture

    @property
    def epoch_samples(self) -> int:
        """Samples that an epoch shows."""
        return len(self.train) if self.mix is None else len(self.mix)


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
    base = read_base(recipe.model)
    engine = plan_engine(recipe, base)
    run.refuse_another_engine(engine.name, engine.zero_stage)
    arguments = training_arguments(recipe, engine)  # before any model is loaded
    halves = read_data(console, recipe.data, base, seed=arguments.seed)
    with arguments.main_process_first():
        fetch_weights(base.source)
    model = prepare_model(recipe, base, seed=arguments.seed)
    if engine.name != "none":
        let_ranks_meet(model, base.family, engine, halves)
    origin = begin(run, recipe, base, engine) if is_first() else None
    wait_for_all()
    show_plan(console, recipe, base, model, halves, arguments, engine)
    fit(console, run, model, base, halves, arguments, engine)
    tensors = final_tensors(model, recipe, base)
    if origin is not None:
        save_final(run, model, tensors, origin)
        plot_loss(run.read_metrics(), run.loss_plot)
        run.mark_finished()
    wait_for_all()
    console.print(f"done: {run.final}; the loss is drawn in {run.loss_plot}", soft_wrap=True)


def begin(run: RunDir, recipe: Recipe, base: Base, engine: Engine) -> Origin:
    """Take the run's directory; the base, with its weights' hash, as results name it."""
    hash_of_base = weights_hash(base.folder)
    run.begin(
        recipe,
        environment(
            dtype=dtype_for_machine(recipe.dtype),
            base_path=str(base.folder.resolve()),
            base_revision=base.source.revision,
            base_hash=hash_of_base,
            engine=engine.name,
            zero_stage=engine.zero_stage,
            world_size=process_count(),
        ),
    )
    return Origin(base.source.name, base.source.path, base.source.revision, hash_of_base)


def plan_engine(recipe: Recipe, base: Base) -> Engine:
    """The engine that the recipe asks for, or that the model's size calls for on this machine.

    Raises:
        VltrainError: it cannot run here.
    """

    def load() -> Load:
        with torch.device("meta"):  # shapes without memory
            model = base.family.model_class(base.config)
        counts = count_parts(let_learn(model, recipe, base, seed=0), base.family).values()
        learned = sum(count.learned for count in counts)
        width = DTYPES[dtype_for_machine(recipe.dtype)].itemsize
        return Load(learned, sum(count.total for count in counts) - learned, width)

    return choose_engine(recipe.engine, recipe.deepspeed, Machine.this(), load, base.family.layers)


def let_ranks_meet(
    model: PreTrainedModel | PeftModel, family: Family, engine: Engine, halves: Halves
) -> None:
    """Run the vision side in batches without pictures too, where other processes wait for it."""
    samples = [half for half in (halves.train, halves.evaluation) if half is not None]
    pictures = any(any(half.image_counts) for half in samples)
    if learns_to_see(model, family) or (pictures and engine.shards_weights):
        family.see_always(model.get_base_model() if isinstance(model, PeftModel) else model)


def read_base(model: str) -> Base:
    """Find the base's folder, its family and its processor; no weight is fetched or read."""
    source = resolve_model(model, weights=False)
    family = family_of(source.path)
    config = family.read_config(read_json(source.path / "config.json"))
    processor = family.read_processor(source.path)
    return Base(source, family, config, processor)


def read_data(console: Console, data: DataConfig, base: Base, *, seed: int) -> Halves:
    """Check every file, then read them; eval samples come from their files or from a share.

    Raises:
        VltrainError: all that is wrong with the files.
    """
    files = [*data.files, *data.eval_files]
    report = check_files(
        files,
        processor=base.processor,
        pictures=pictures_of(data),
        max_length=data.max_length,
        too_long=data.too_long,
        labels=data.labels,
        format=data.format,
        bad_pictures=data.bad_pictures,
    )
    if report.findings:
        print_report(report, console)
    refuse_errors(report, files, undone="trained")
    records, held_out = split_records(_kept(data.files, report), data.eval_share, seed)
    held_out += _kept(data.eval_files, report)
    samples = _samples(records, data, base, data.bad_pictures)
    mix = mix_of(data, np.array([data.files.index(record.file) for record in samples.records]))
    return Halves(
        train=samples,
        evaluation=_samples(held_out, data, base, "error") if held_out else None,
        mix=mix,
        rows=_rows(samples, data, mix, seed) if data.packing else None,
        dropped=report.dropped,
    )


def _kept(files: Sequence[Path], report: Report) -> list[Record]:
    """The records of files, but for those that are dropped; VltrainError if that is all."""
    dropped = {(found.file, found.record) for found in report.findings if found.drops}
    records = (record for file in files for record in read_records(file))
    kept = [record for record in records if (str(record.file), record.index) not in dropped]
    if files and not kept:
        raise VltrainError.at(
            ", ".join(map(str, files)),
            what=f"nothing is left: all records are dropped ({report.dropped:,} of all files)",
            fix="mend the pictures or raise data.max_length: the findings above say which",
        )
    return kept


def _rows(samples: SampleDataset, data: DataConfig, mix: Mix | None, seed: int) -> PackedDataset:
    """The samples of an epoch, packed.

    What a mix draws of a file is drawn once and shown in every epoch: other samples would fill
    another number of rows, and a run that resumes counts its steps in rows.
    """
    numbers = None if mix is None else mix.numbers(seed=seed, epoch=0)
    return PackedDataset(samples, data.max_length, numbers)


def _samples(
    records: list[Record], data: DataConfig, base: Base, bad_pictures: BadPictures
) -> SampleDataset:
    samples = SampleDataset(
        records,
        base.processor,
        labels=data.labels,
        max_length=data.max_length,
        pictures=pictures_of(data),
        format=data.format,
        bad_pictures=bad_pictures,
    )
    _refuse_foreign_ids(samples, base)
    return samples


def _refuse_foreign_ids(samples: SampleDataset, base: Base) -> None:
    """Raise VltrainError where a sample has an id that the embedding matrix has no row for."""
    for record, largest in zip(samples.records, samples.largest_ids, strict=True):
        if largest >= base.vocabulary_size:
            raise foreign_id_error(record.name, largest, base.vocabulary_size, base.folder)


def prepare_model(recipe: Recipe, base: Base, *, seed: int) -> PreTrainedModel | PeftModel:
    """The base, loaded, with gradients on what the recipe lets learn."""
    if recipe.method == "lora":
        refuse_impossible(recipe.freeze)  # before the minutes that loading may take
    model = load_model(base.folder, dtype=dtype_for_machine(recipe.dtype))
    model.config.use_cache = False
    if recipe.data.packing:
        attend_packed(model)
    return let_learn(model, recipe, base, seed=seed)


def let_learn(
    model: PreTrainedModel, recipe: Recipe, base: Base, *, seed: int
) -> PreTrainedModel | PeftModel:
    """The model with gradients on what the recipe lets learn, adapters beside it or not."""
    if recipe.method == "full":
        return set_learned(model, base.family, recipe.freeze)
    embeddings = recipe.lora.embeddings
    if embeddings == "auto":
        embeddings = not is_chat_tuned(base.folder)
    adapter = Adapter(
        r=recipe.lora.r,
        alpha=recipe.lora.alpha,
        dropout=recipe.lora.dropout,
        targets=recipe.lora.targets,
        embeddings=embeddings,
    )
    return add_lora(model, base.family, recipe.freeze, adapter, seed=seed)


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
    samples = halves.train
    step = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    step *= process_count()
    console.print(
        f"{len(samples):,} samples, {sum(samples.lengths):,} tokens "
        f"({sum(samples.learned_tokens):,} learned), {sum(samples.image_counts):,} pictures; "
        f"longest {max(samples.lengths):,} tokens, {halves.dropped:,} dropped",
        soft_wrap=True,
    )
    if halves.mix is not None:
        console.print(f"an epoch: {halves.mix}", soft_wrap=True)
    if halves.evaluation is not None:
        console.print(f"{len(halves.evaluation):,} samples to evaluate on")
    rows = halves.rows
    if rows is not None:
        console.print(
            f"packed into {len(rows):,} rows of up to {rows.row_tokens:,} tokens, "
            f"{rows.fill:.1%} full",
            soft_wrap=True,
        )
    units, noun = (halves.epoch_samples, "samples") if rows is None else (len(rows), "rows")
    console.print(
        f"{step_count(arguments, units):,} steps of {step:,} {noun}, "
        f"weights in {dtype_for_machine(recipe.dtype)}, on {arguments.device}"
    )
    if engine.name != "none":
        console.print(
            f"{process_count()} processes under {engine}: {engine.reason}", soft_wrap=True
        )


def fit(
    console: Console,
    run: RunDir,
    model: PreTrainedModel | PeftModel,
    base: Base,
    halves: Halves,
    arguments: TrainingArguments,
    engine: Engine,
) -> None:
    """Train, from the last whole checkpoint if there is one."""
    checkpoint = run.last_checkpoint()
    if is_first():
        run.cut_metrics(0 if checkpoint is None else checkpoint_step(checkpoint))
    if checkpoint is not None:
        console.print(f"resuming from {checkpoint}", soft_wrap=True)
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
        callbacks=[MetricsLog(run.append_metrics), progress],
    )
    trainer.remove_callback(PrinterCallback)
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    finally:
        progress.bar.stop()  # or a run that breaks off leaves the terminal without a cursor


def final_tensors(
    model: PreTrainedModel | PeftModel, recipe: Recipe, base: Base
) -> dict[str, torch.Tensor]:
    """What a run has made, put together from all processes; {} in all but the first.

    Of an adapter what has learned, in its own dtype; of a model all of it, in its checkpoint's
    dtype and by its published names. What did not learn is the base's to the bit: a run in a
    narrower dtype has rounded it, so it is read again then.
    """
    parameters = list(model.named_parameters())
    learned = [(name, p) for name, p in parameters if p.requires_grad]
    if isinstance(model, PeftModel):
        return whole_tensors(learned, keep=is_first())
    dtype = checkpoint_dtype(base.folder)
    rounded = DTYPES[dtype_for_machine(recipe.dtype)] not in (dtype, torch.float32)
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
