"""Measured seconds, memory and utilisation of training steps on this machine: `vltrain profile`."""

import gc
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import torch
from peft import PeftModel
from rich.console import Console
from transformers import PreTrainedModel

from vltrain.config import Method, Recipe
from vltrain.data.collation import Collator, collate_rows
from vltrain.data.dataset import RecordReader
from vltrain.data.feature_store import FeatureStore, picture_hash
from vltrain.data.records import Record
from vltrain.errors import GpuMemoryError, VltrainError
from vltrain.models.adapters import ADAPTER_MARK, count_parts, published_name
from vltrain.models.catalog import FAMILIES
from vltrain.models.family import FeatureStage
from vltrain.models.features import compute_features, frozen_stage
from vltrain.models.hub import ResolvedModel, fetch_weights
from vltrain.models.loading import DTYPES
from vltrain.recipe_yaml import read_yaml
from vltrain.trainer_config import WHOLE_STEPS
from vltrain.training.arguments import run_dtype, training_arguments
from vltrain.training.engines import NO_ENGINE
from vltrain.training.files import write_whole
from vltrain.training.flops import ModelWork, Weights, matmul_rate
from vltrain.training.made_up import MadeUpSamples, spread_lengths, write_photo
from vltrain.training.memory import GIB
from vltrain.training.profiling import measure
from vltrain.workflows.base import Base, count_run, memory_of, read_base, refuse_unfit_fp8
from vltrain.workflows.estimate import draft, probe_recipe, random_model
from vltrain.workflows.features import autocast_of
from vltrain.workflows.memory import gpu_memory, held_by_others, layers_of
from vltrain.workflows.prepare import hold_weights, prepare_model, refuse_unfit_base
from vltrain.workflows.profile_report import Row, Setting, Span, as_object, headings, line, show
from vltrain.workflows.quiet import hide_weight_bars
from vltrain.workflows.run_data import Halves, Packer
from vltrain.workflows.settle import leaves_rows_open, settled
from vltrain.workflows.train import optimizer_of

STEP_SAMPLES = 8  # of the original's own table: 1 at a time, accumulated 8 times
LENGTHS = (384, 512, 1024, 2048)  # tokens of a sample, as there
MIXED = "mixed"
Length = int | Literal["mixed"]
"""Tokens of each sample; or of all lengths from the least to the greatest that is given."""
WARMUP_STEPS, COMPILING_STEPS = 1, 3  # before the measured ones; 3 where layers are compiled
PUBLISHED = "the published size"


@dataclass(frozen=True)
class Subject:
    """What is measured."""

    recipe: Recipe  # as it is asked for: what it leaves open, each length decides
    base: Base
    model: PreTrainedModel | PeftModel
    work: ModelWork
    picture: Callable[[], dict[str, Any]]  # what a sample has of its picture
    skipped: tuple[str, ...]  # of the model's parts: what they make of pictures is kept
    taken: int = 0  # bytes of the GPU that other programs held before the model was there


def profile_steps(
    recipe_file: Path | None,
    *,
    method: Method | None = None,
    model: str | None = None,
    random: bool = False,
    lengths: Sequence[Length] = (*LENGTHS, MIXED),
    steps: int = 5,
    overrides: Sequence[str] = (),
    output: Path | None = None,
) -> None:
    """Train some steps of made-up samples of each length, and print what they took.

    Args:
        recipe_file, method, model, overrides: as for a run; data and output are not used. Without
            a model, one of the published size is made with random weights.
        random: take of the model its size alone.
        lengths: tokens of a sample, a picture included.
        steps: that are measured, of each length.
        output: a file for the figures as JSON.

    Raises:
        VltrainError: a recipe that cannot be measured, or a model that does not fit.
    """
    hide_weight_bars()
    console = Console()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        asked, base, made_up = _read(folder, recipe_file, method, model, overrides)
        recipe = settled(asked, NO_ENGINE)
        spans = _spans(lengths, base)
        _refuse_small_machine(recipe, base)
        random = random or made_up
        setting = Setting(
            recipe,
            base.source.name,
            random=random,
            dtype=run_dtype(recipe),
            samples=STEP_SAMPLES,
            rate=matmul_rate(_device(), DTYPES[run_dtype(recipe)]),
            kept=keeps_features(recipe),
        )
        for heading in headings(setting):
            console.print(heading, soft_wrap=True, highlight=False)
        taken = held_by_others()
        subject = _subject(recipe, base, folder, random=random)
        subject = replace(subject, recipe=asked, taken=taken)
        rows: list[Row] = []
        for span in spans:
            rows.append(_measured(subject, setting.rate, span, steps, folder))
            console.print(line(rows[-1]), soft_wrap=True, highlight=False)
            if output is not None:
                write_whole(output, json.dumps(as_object(setting, rows), indent=1))
    show(console, setting, rows)
    if output is not None:
        console.print(f"figures: {output}", soft_wrap=True)


def _read(
    folder: Path,
    recipe_file: Path | None,
    method: Method | None,
    model: str | None,
    overrides: Sequence[str],
) -> tuple[Recipe, Base, bool]:
    """The recipe, in steps of STEP_SAMPLES, its base, and whether that is made up."""
    published = folder / PUBLISHED
    published.mkdir()
    values = read_yaml(recipe_file) if recipe_file else {}
    given = {override.partition("=")[0].strip() for override in overrides}
    if not (model or values.get("model") or "model" in given):
        model = str(published)
    recipe = draft(recipe_file, method=method, model=model, data=(), overrides=overrides)
    recipe = in_steps_of(recipe, STEP_SAMPLES)
    if recipe.model != str(published):
        base = read_base(recipe.model)
        refuse_unfit_base(recipe, base.folder)
        refuse_unfit_fp8(recipe, base)
        return recipe, base, False
    family = FAMILIES[0]
    config = family.read_config({})
    config.save_pretrained(published)
    (published / "generation_config.json").write_text('{"chat_format": "chatml"}')
    source = ResolvedModel(published, None, f"{family.name} of {PUBLISHED}")
    base = Base(source, family, config, None)
    refuse_unfit_fp8(recipe, base)
    return recipe, base, True


def in_steps_of(recipe: Recipe, samples: int) -> Recipe:
    """The recipe with so many samples a step, on one GPU.

    Raises:
        VltrainError: it wants several processes, or batches of another size.
    """
    if recipe.needs_processes:
        raise VltrainError.at(
            "engine",
            what="one GPU is measured, and the recipe asks for an engine of several",
            fix="take out engine and deepspeed: --set engine=auto",
        )
    if recipe.data.packs:
        batch = replace(recipe.batch, samples=samples)
        return replace(recipe, batch=batch, trainer=recipe.trainer | WHOLE_STEPS)
    at_once = recipe.trainer["per_device_train_batch_size"]
    if samples % at_once:
        raise VltrainError.at(
            "trainer.per_device_train_batch_size",
            what=f"a step of {samples} samples is measured, and {at_once} do not divide it",
            fix="set it to 1, 2, 4 or 8",
        )
    trainer = recipe.trainer | {"gradient_accumulation_steps": samples // at_once}
    return replace(recipe, trainer=trainer)


def keeps_features(recipe: Recipe) -> bool:
    """Whether samples show what is kept of a picture; by `auto`, where the tower is frozen."""
    return recipe.data.cache_features is not False and recipe.freeze.vision


def _spans(lengths: Sequence[Length], base: Base) -> list[Span]:
    """What is measured, of lengths that samples can have.

    Raises:
        VltrainError: some have no room for a picture, or there are none to mix.
    """
    numbers = [tokens for tokens in lengths if tokens != MIXED]
    least = len(base.family.example_picture(base.config).input_ids) + 2
    short = [str(tokens) for tokens in numbers if tokens < least]
    if short or not numbers:
        raise VltrainError.at(
            "--lengths",
            what=f"{', '.join(short) or 'no number'} is given, and a sample with a picture has at "
            f"least {least:,} tokens",
            fix=f"give lengths of {least:,} or more",
        )
    mixed = Span(min(numbers), max(numbers))
    return [mixed if tokens == MIXED else Span(tokens, tokens) for tokens in lengths]


def _refuse_small_machine(recipe: Recipe, base: Base) -> None:
    """Raise VltrainError where a machine without a GPU has less memory than the weights take."""
    if torch.cuda.is_available():
        return
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    needed = count_run(recipe, base, None).census.all.total_bytes
    if needed > there:
        raise VltrainError.at(
            base.source.name,
            what=f"its weights take {needed / GIB:,.1f} GiB in {run_dtype(recipe)}, and this "
            f"machine has {there / GIB:,.1f} and no GPU",
            fix="name a smaller model: --model demo/model, which `vltrain demo demo` writes",
        )


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _subject(recipe: Recipe, base: Base, folder: Path, *, random: bool) -> Subject:
    """The model, ready to learn, and the picture that each sample shows."""
    seed = recipe.trainer["seed"]
    try:
        if random:
            model = random_model(recipe, base, seed=seed)
        else:
            fetch_weights(base.source)
            model = prepare_model(recipe, base.family, base.folder, device=_device(), seed=seed)
            hold_weights(model, recipe, gpu_memory())
            if recipe.method != "qlora":
                model.to(_device())
    except torch.cuda.OutOfMemoryError as error:
        raise GpuMemoryError.at(
            base.source.name,
            what=f"its weights alone do not fit the GPU ({_first_line(error)})",
            fix="profile --method qlora, whose weights are a third; or free the GPU's memory",
        ) from error
    stage = frozen_stage(model, base.family) if keeps_features(recipe) else None
    picture = _picture(recipe, base, model, stage, folder)
    skipped = () if stage is None else stage.fed_by
    return Subject(recipe, base, model, work_of_model(model, base), picture, skipped)


def _picture(
    recipe: Recipe,
    base: Base,
    model: PreTrainedModel | PeftModel,
    stage: FeatureStage | None,
    folder: Path,
) -> Callable[[], dict[str, Any]]:
    """What reads the picture of a sample as a run reads it: a JPEG, or features that are kept."""
    photo = folder / "photo.jpg"
    write_photo(photo)
    reader = RecordReader(base.family.example_picture(base.config))
    if stage is not None:
        dtype = DTYPES[run_dtype(recipe)]
        name = str(dtype).removeprefix("torch.")
        shape = stage.shape(base.config)
        store = FeatureStore(folder / "features" / "made", stage.input_name, shape, name)
        store.open()
        autocast = autocast_of(training_arguments(recipe), NO_ENGINE)
        pixels = reader.pixels(photo)[None]
        made = compute_features(model, stage, pixels, dtype=dtype, autocast=autocast)
        digest = picture_hash(photo.read_bytes())
        store.keep(digest, made[0])
        store.link(store.place_of(photo), digest)
        reader = replace(reader, features=store)
    return partial(reader.shown, [str(photo)], Record(photo, 0, None))


def work_of_model(model: PreTrainedModel | PeftModel, base: Base) -> ModelWork:
    """The weights of a model that tokens go through, and which of them learn."""
    sizes = base.family.read_sizes(base.config)
    counts = count_parts(model, base.family)
    head = sizes.decoder.vocabulary * sizes.decoder.width
    tied = 1 if getattr(base.config, "tie_word_embeddings", False) else 2
    tables = {
        id(p)
        for module in (model.get_input_embeddings(), model.get_output_embeddings())
        for p in module.parameters()
    }
    reads_out = {id(p) for p in model.get_output_embeddings().parameters()}
    layers_learn = head_learns = False
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or ADAPTER_MARK in name:
            continue
        head_learns = head_learns or id(parameter) in reads_out
        in_language = base.family.parts.of(published_name(name)) == "language"
        layers_learn = layers_learn or (in_language and id(parameter) not in tables)
    return ModelWork(
        layers=Weights(counts["language"].total - tied * head, layers_learn),
        head=Weights(head, head_learns),
        vision=Weights(counts["vision"].total, counts["vision"].learned > 0),
        projector=Weights(counts["projector"].total, counts["projector"].learned > 0),
        patches=sizes.tower.patches,
        image_tokens=sizes.tower.image_tokens,
    )


def _measured(subject: Subject, rate: float, span: Span, steps: int, folder: Path) -> Row:
    """Steps of samples of some lengths; that they do not fit is an answer, too."""
    try:
        return _train(subject, rate, span, steps, folder)
    except torch.cuda.OutOfMemoryError as error:
        problem = f"does not fit the GPU ({_first_line(error)})"
    # Behind the handler, whose traceback holds what the step had made.
    subject.model.zero_grad(set_to_none=True)
    gc.collect()
    torch.cuda.empty_cache()
    return Row(span, error=problem)


def _train(subject: Subject, rate: float, span: Span, steps: int, folder: Path) -> Row:
    base, model = subject.base, subject.model
    asked = replace(subject.recipe, data=replace(subject.recipe.data, max_length=span.longest))
    recipe = settled(asked, NO_ENGINE)
    picture_ids = base.family.example_picture(base.config).input_ids
    warmup = COMPILING_STEPS if recipe.compile else WARMUP_STEPS
    recipe = probe_recipe(recipe, folder / "run")
    recipe = replace(recipe, trainer=recipe.trainer | {"max_steps": warmup + steps})
    tokens = spread_lengths(span.shortest, span.longest, STEP_SAMPLES * (warmup + steps + 1))
    samples = MadeUpSamples(picture_ids, tokens, subject.picture)
    arguments = training_arguments(recipe)
    rows = None
    if recipe.data.packs:
        rows = Packer(recipe.data, STEP_SAMPLES, 1, arguments.seed).rows(samples, None)
    halves, run = Halves(samples, None, rows=rows), None
    if gpu_bytes := gpu_memory():
        kept = replace(recipe, data=replace(recipe.data, cache_features=bool(subject.skipped)))
        halves, run = memory_of(
            kept,
            base,
            arguments,
            NO_ENGINE,
            halves,
            rows_open=leaves_rows_open(asked),
            gpu_bytes=gpu_bytes,
            taken=subject.taken,
        )
    held = hold_weights(model, recipe, gpu_memory())
    measured = measure(
        model,
        arguments,
        samples if halves.rows is None else halves.rows,
        Collator(0) if halves.rows is None else collate_rows,
        layers=layers_of(recipe, NO_ENGINE, run),
        optimizer=optimizer_of(recipe, arguments, held),
    )
    seconds = measured.seconds_per_step(warmup)
    taken, learned = (mean(each[warmup:]) for each in (measured.tokens, measured.learned))
    flops = subject.work.step_flops(
        tokens=taken, learned=learned, pictures=STEP_SAMPLES, skipped=subject.skipped
    )
    return Row(
        span,
        seconds_per_step=seconds,
        waiting_share=measured.waiting_share(warmup),
        tokens_per_second=taken / seconds,
        learned_tokens_per_second=learned / seconds,
        flops=flops,
        utilisation=flops / seconds / rate,
        peak_gib=_gib(measured.peak_bytes),
        reserved_gib=_gib(measured.reserved_bytes),
        seconds=measured.seconds[warmup:],
    )


def _gib(size: int | None) -> float | None:
    return None if size is None else size / GIB


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0].partition(". ")[0]
