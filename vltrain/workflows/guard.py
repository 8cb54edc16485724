"""Around a run: alone in its directory, stopped in order, on the data that it began with."""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from vltrain.config import DataConfig, Recipe
from vltrain.data.dataset import SampleDataset
from vltrain.errors import GpuMemoryError, VltrainError
from vltrain.training.files import is_disk_full
from vltrain.training.lock import locked
from vltrain.training.processes import is_first
from vltrain.training.run_dir import RunDir
from vltrain.training.stopping import StopSignals
from vltrain.workflows.advice import memory_advice


@contextmanager
def guarded(recipe: Recipe, run: RunDir) -> Iterator[StopSignals]:
    """Hold a run's directory and catch its signals; full memory and full disk become errors.

    Raises:
        VltrainError: another run is in the directory, or the disk is full.
        GpuMemoryError: a GPU's memory did not suffice.
        Stopped: a signal came while no step was being taken.
    """
    signals = StopSignals()
    with signals.caught(), locked(run.path) if is_first() else nullcontext():
        try:
            yield signals
        except torch.OutOfMemoryError as error:
            raise out_of_memory(recipe, error) from error
        except (OSError, RuntimeError, SafetensorError) as error:
            if not is_disk_full(error):
                raise
            raise VltrainError.at(
                str(run.path),
                what=f"nothing more can be written, the disk is full: {error}",
                fix="make space; the same command goes on from the last checkpoint",
            ) from error


def out_of_memory(recipe: Recipe, error: torch.OutOfMemoryError) -> GpuMemoryError:
    """What the allocator said, and what to change, the cheapest first."""
    said = str(error).partition(". Of the allocated memory")[0]
    return GpuMemoryError.at(
        f"vltrain {recipe.method}", what=said, fix="\n       ".join(memory_advice(recipe))
    )


def data_fingerprint(data: DataConfig, samples: SampleDataset) -> dict[str, Any]:
    """What tells whether a run's data are those that it began with; pictures do not count.

    Returns:
        `files`: bytes and SHA-256 of each, of a folder of what lies in it by name and size;
        `samples`: how many, their tokens, and a hash of their lengths in order, which tells
        of a data set on the hub.
    """
    paths = [Path(file) for file in (*data.files, *data.eval_files)]
    lengths = hashlib.sha256()
    for counts in (samples.lengths, samples.learned_tokens, samples.image_counts):
        lengths.update(np.asarray(counts, dtype=np.int64).tobytes())
    return {
        "files": {str(path): _fingerprint(path) for path in paths if path.exists()},
        "samples": {
            "count": len(samples),
            "tokens": int(np.asarray(samples.lengths).sum(dtype=np.int64)),
            "lengths": lengths.hexdigest(),
        },
    }


def _fingerprint(path: Path) -> dict[str, Any]:
    if path.is_file():
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256")
        return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}
    sizes = {str(f.relative_to(path)): f.stat().st_size for f in path.rglob("*") if f.is_file()}
    digest = hashlib.sha256(repr(sorted(sizes.items())).encode())
    return {"bytes": sum(sizes.values()), "sha256": digest.hexdigest()}


def refuse_changed_data(run: RunDir, here: Mapping[str, Any]) -> None:
    """Raise VltrainError where a run began with other data; it names the files."""
    there = run.read_data_fingerprint()
    if there is None or there == here:
        return
    changed = [
        f"{file} ({_bytes(there['files'].get(file))} then, {_bytes(here['files'].get(file))} now)"
        for file in dict.fromkeys([*there["files"], *here["files"]])
        if there["files"].get(file) != here["files"].get(file)
    ]
    then, now = there["samples"], here["samples"]
    samples = f"{then['count']:,} samples of {then['tokens']:,} tokens then, {now['count']:,} of "
    what = ", ".join(changed) or f"the samples: {samples}{now['tokens']:,} now"
    raise VltrainError.at(
        str(run.path),
        what=f"the data changed since this run began: {what}",
        fix="bring back the data of then, or start anew with another --output",
    )


def _bytes(fingerprint: Mapping[str, Any] | None) -> str:
    return "not there" if fingerprint is None else f"{fingerprint['bytes']:,} bytes"
