"""Around a run: alone in its directory, stopped in order, on the data that it began with,
in memory that it fits."""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from safetensors import SafetensorError
from transformers import TrainingArguments

from vltrain.config import DataConfig, Recipe
from vltrain.data.dataset import SampleDataset
from vltrain.data.file_hashes import Stamp, hashed
from vltrain.data.streaming import SampleStream
from vltrain.errors import GpuMemoryError, VltrainError
from vltrain.training.arguments import step_count
from vltrain.training.disk import SavedBytes, refuse_small_disk, save_count
from vltrain.training.engines import Engine
from vltrain.training.files import is_disk_full
from vltrain.training.lock import locked
from vltrain.training.memory import GIB
from vltrain.training.processes import is_first, least_of_all, process_count
from vltrain.training.run_dir import RunDir
from vltrain.training.stopping import StopSignals
from vltrain.training.universal import (
    refuse_fixed_shares,
    refuse_no_room_to_share,
    share_count,
)
from vltrain.workflows.advice import memory_advice, refuse_what_cannot_fit
from vltrain.workflows.base import Base, memory_of
from vltrain.workflows.memory import RunMemory, gpu_memory, held_by_others, show_memory
from vltrain.workflows.run_data import Halves
from vltrain.workflows.settle import in_rows_of_at_most


@contextmanager
def guarded(run: RunDir) -> Iterator[StopSignals]:
    """Hold a run's directory and catch its signals; a full disk becomes an error.

    Raises:
        VltrainError: another run is in the directory, or the disk is full.
        Stopped: a signal came while no step was being taken.
    """
    signals = StopSignals()
    with signals.caught(), locked(run.path) if is_first() else nullcontext():
        try:
            yield signals
        except (OSError, RuntimeError, SafetensorError) as error:
            if not is_disk_full(error):
                raise
            raise VltrainError.at(
                str(run.path),
                what=f"nothing more can be written, the disk is full: {error}",
                fix="make space; the same command goes on from the last checkpoint",
            ) from error


@contextmanager
def advised(recipe: Recipe, memory: RunMemory | None) -> Iterator[None]:
    """Make a GPU's full memory an error with what to change, the cheapest first.

    Args:
        recipe: of the run.
        memory: what the run was estimated to take; None where that is not known.

    Raises:
        GpuMemoryError: a GPU's memory did not suffice.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        said = str(error).partition(". Of the allocated memory")[0]
        advice = "\n       ".join(memory_advice(recipe, memory))
        raise GpuMemoryError.at(f"vltrain {recipe.method}", what=said, fix=advice) from error


def check_memory(
    console: Console,
    recipe: Recipe,
    base: Base,
    halves: Halves,
    arguments: TrainingArguments,
    engine: Engine,
    *,
    rows_open: bool,
) -> tuple[Halves, RunMemory | None]:
    """What a run will take of the GPU that is there, shown; None without one.

    Args:
        rows_open: whether rows may be shorter, where the memory asks for it.

    Returns:
        The data, in rows that fit, and the memory.

    Raises:
        VltrainError: it cannot fit, and `memory_check` is on.
    """
    gpu_bytes = gpu_memory()
    if gpu_bytes is None:
        return halves, None
    taken = held_by_others()
    halves, run = memory_of(
        recipe,
        base,
        arguments,
        engine,
        halves,
        rows_open=rows_open,
        processes=process_count(),
        gpu_bytes=gpu_bytes,
        taken=taken,
    )
    if rows_open:  # of another length in another process they would be another number
        halves = in_rows_of_at_most(halves, lambda own: least_of_all(own, arguments.device))
    show_memory(console, run, gpu_bytes)
    if taken:
        left = gpu_bytes - taken
        verdict = ": too little" if run.estimate.needed > left else ""
        console.print(
            f"other programs hold {taken / GIB:.1f} GiB of the GPU, {left / GIB:.1f} are left"
            f"{verdict}"
        )
    for line in run.decisions:
        console.print(line, soft_wrap=True)
    if recipe.memory_check:
        refuse_what_cannot_fit(recipe, run, gpu_bytes)
    return halves, run


def refuse_no_space(
    run: RunDir, size: SavedBytes, arguments: TrainingArguments, halves: Halves
) -> None:
    """Raise VltrainError where a run's checkpoints, each of that size, will not fit on its disk."""
    saves = save_count(arguments, step_count(arguments, halves.epoch_units[0]))
    refuse_small_disk(run.path, size, keep=arguments.save_total_limit, saves=saves)


def on_processes_of_now(engine: Engine, run: RunDir, processes: int) -> Engine:
    """The engine, told to read what another number of processes wrote, if the run needs that.

    Raises:
        VltrainError: the checkpoint to go on from is of another engine, or cannot be shared out
            anew, be it for want of space.
    """
    run.refuse_another_engine(engine.name, engine.zero_stage)
    checkpoint = run.last_checkpoint()
    if checkpoint is None or share_count(checkpoint) in (0, processes):
        return engine
    refuse_fixed_shares(checkpoint, processes)
    refuse_no_room_to_share(checkpoint)
    return engine.for_any_number()


def in_steps_of_before(recipe: Recipe, run: RunDir, processes: int) -> Recipe:
    """The recipe of a run that resumes, with steps of as many samples as when it began.

    Where it is on another number of processes, accumulation makes up for it: so the place in
    the data, the number of steps and the learning rate hold.

    Raises:
        VltrainError: with so many processes no accumulation does it.
    """
    there = run.read_data_fingerprint() or {}
    wanted = there.get("samples_per_step")
    at_once = recipe.trainer["per_device_train_batch_size"] * processes
    if wanted is None or wanted == samples_per_step(recipe, processes):
        return recipe
    if wanted % at_once:
        raise VltrainError.at(
            str(run.path),
            what=f"a step of this run takes {wanted} samples, and {processes} processes take "
            f"{at_once} at once",
            fix="resume on as many processes as it began on, or a number that divides them",
        )
    settings = {**recipe.trainer, "gradient_accumulation_steps": wanted // at_once}
    return replace(recipe, trainer=settings)


def samples_per_step(recipe: Recipe, processes: int) -> int:
    """Samples, or rows of the epoch's packed ones, between two updates, of all processes."""
    if recipe.batch.samples is not None:
        return recipe.batch.samples
    trainer = recipe.trainer
    batch = trainer["per_device_train_batch_size"] * trainer["gradient_accumulation_steps"]
    return batch * processes


def data_fingerprint(
    data: DataConfig,
    samples: SampleDataset | SampleStream,
    before: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What tells whether a run's data are those that it began with; pictures do not count.

    Args:
        data: the recipe's section.
        samples: what is learned from.
        before: what this said earlier: a file that is known by its stamp is not read again.

    Returns:
        `files`: bytes and SHA-256 of each, of a folder of what lies in it by name and size;
        `stamps`: by what files are known, see `hashed`;
        `samples`: how many, their tokens, and a hash of their lengths in order, which tells
        of a data set on the hub; of a stream, which nobody has counted, nothing.
    """
    paths = [Path(file) for file in (*data.files, *data.eval_files)]
    before = before or {}
    files: dict[str, Any] = {}
    stamps: dict[str, Stamp] = {}
    for path in (path for path in paths if path.exists()):
        name = str(path)
        if not path.is_file():
            files[name] = _listed(path)
            continue
        known, stamp = (before.get(key, {}).get(name) for key in ("files", "stamps"))
        files[name], stamp = hashed(path, known, stamp)
        stamps |= {} if stamp is None else {name: stamp}
    about = {"files": files, "stamps": stamps}
    if isinstance(samples, SampleStream):
        return {**about, "samples": None}
    lengths = hashlib.sha256()
    for counts in (samples.lengths, samples.learned_tokens, samples.image_counts):
        lengths.update(np.asarray(counts, dtype=np.int64).tobytes())
    counted = {
        "count": len(samples),
        "tokens": int(samples.lengths.sum(dtype=np.int64)),
        "lengths": lengths.hexdigest(),
    }
    return {**about, "samples": counted}


def _listed(path: Path) -> dict[str, Any]:
    """The bytes of what lies in a folder, and a hash of names and sizes."""
    sizes = {str(f.relative_to(path)): f.stat().st_size for f in path.rglob("*") if f.is_file()}
    digest = hashlib.sha256(repr(sorted(sizes.items())).encode())
    return {"bytes": sum(sizes.values()), "sha256": digest.hexdigest()}


def refuse_changed_data(run: RunDir, here: Mapping[str, Any]) -> None:
    """Raise VltrainError where a run began with other data; it names the files."""
    there = run.read_data_fingerprint()
    if there is None or all(there[key] == here[key] for key in ("files", "samples")):
        return
    changed = [
        f"{file} ({_bytes(there['files'].get(file))} then, {_bytes(here['files'].get(file))} now)"
        for file in dict.fromkeys([*there["files"], *here["files"]])
        if there["files"].get(file) != here["files"].get(file)
    ]
    if not changed:
        then, now = there["samples"], here["samples"]
        changed = [
            f"the samples: {then['count']:,} samples of {then['tokens']:,} tokens then, "
            f"{now['count']:,} of {now['tokens']:,} now"
        ]
    raise VltrainError.at(
        str(run.path),
        what=f"the data changed since this run began: {', '.join(changed)}",
        fix="bring back the data of then, or start anew with another --output",
    )


def _bytes(fingerprint: Mapping[str, Any] | None) -> str:
    return "not there" if fingerprint is None else f"{fingerprint['bytes']:,} bytes"
