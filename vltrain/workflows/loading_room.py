"""Room in shared memory for what processes that open pictures hand over."""

import os
from pathlib import Path

import numpy as np
from torch import Tensor
from transformers import TrainingArguments

from vltrain.data.dataset import SampleDataset
from vltrain.data.step_rows import StepRows
from vltrain.training.memory import GIB
from vltrain.training.processes import local_share
from vltrain.workflows.memory import longest_share
from vltrain.workflows.run_data import Halves

SHARED = Path("/dev/shm")
AHEAD = 2  # batches of each process that wait, as torch has it by itself
IN_HAND = 3  # that the training process holds: the step's, the next one's, and one behind that
USED_SHARE = 0.8  # of what is free there: other programs want some, too
LARGER_FEATURES = 1.5  # what is kept of a picture for a resampler that learns, beside its pixels
TOKEN_BYTES = 64  # of a batch beside its pictures: ids, labels and positions of 8 bytes, and more


def free_bytes() -> int | None:
    """Bytes that are free in shared memory; None where the system has no such folder."""
    if not SHARED.is_dir():
        return None
    there = os.statvfs(SHARED)
    return there.f_bavail * there.f_frsize


def fit_workers(arguments: TrainingArguments, halves: Halves) -> str | None:
    """Let no more processes open pictures than shared memory has room for their batches.

    Where the samples of a step are packed, what a process hands over is all of a step: in a
    container, whose shared memory is often 64 MiB, some of these are too many. A process that
    finds none left would leave the run waiting.

    Args:
        arguments: of the run; changed where the room does not suffice.
        halves: the data.

    Returns:
        What was changed, in words.
    """
    free, asked = free_bytes(), arguments.dataloader_num_workers
    if free is None or not asked or not isinstance(halves.rows, StepRows):
        return None
    _, processes_here = local_share()
    batch = processes_here * batch_bytes(halves.train, halves.rows)
    room, ahead = USED_SHARE * free, arguments.dataloader_prefetch_factor or AHEAD
    need = (asked * ahead + IN_HAND) * batch
    if need <= room:
        return None
    fitting = max(0, min(asked, int(room / batch) - IN_HAND))  # of which each is one batch ahead
    arguments.dataloader_num_workers = fitting
    arguments.dataloader_prefetch_factor = 1 if fitting else None
    arguments.dataloader_persistent_workers &= fitting > 0
    return (
        f"{fitting} of {asked} processes open pictures, with one batch ahead in the place of "
        f"{ahead}: {SHARED} has no room for more; {need / USED_SHARE / GIB:.2f} GiB of it would "
        "do (of a container: --shm-size)"
    )


def batch_bytes(samples: SampleDataset, rows: StepRows) -> int:
    """Bytes of what a process gets of a step, at most: the longest samples, and most pictures."""
    share = -(-rows.step_samples // rows.processes)
    counts = np.sort(samples.image_counts)[-share:]
    most = int(samples.image_counts.argmax())
    # Of each picture as much as of those of the sample that has most.
    shown = samples[most] if counts[-1] else {}
    pictures = sum(v.nbytes for v in shown.values() if isinstance(v, Tensor))
    pictures *= int(counts.sum()) / max(1, int(counts[-1]))
    tokens = longest_share(samples.lengths, rows)
    return round(pictures * LARGER_FEATURES) + tokens * TOKEN_BYTES
