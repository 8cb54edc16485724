"""Room in shared memory for what processes that open pictures hand over."""

import os
from pathlib import Path

from torch import Tensor
from transformers import TrainingArguments

from vltrain.data.dataset import SampleDataset
from vltrain.data.step_rows import StepRows
from vltrain.training.memory import GIB
from vltrain.training.processes import local_share
from vltrain.workflows.run_data import Halves

SHARED = Path("/dev/shm")
AHEAD = 2  # batches of each process that wait, as torch has it by itself
USED_SHARE = 0.8  # of what is free there: other programs want some, too


def free_bytes() -> int | None:
    """Bytes that are free in shared memory; None where the system has no such folder."""
    if not SHARED.is_dir():
        return None
    there = os.statvfs(SHARED)
    return there.f_bavail * there.f_frsize


def fit_workers(arguments: TrainingArguments, halves: Halves) -> str | None:
    """Let no more processes open pictures than shared memory has room for their batches.

    Where the samples of a step are packed, what a process hands over is all of a step: in a
    container, whose shared memory is often 64 MiB, some of these are too many.

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
    share = -(-halves.rows.step_samples // halves.rows.processes)
    batch = processes_here * share * sample_bytes(halves)
    room, wanted = USED_SHARE * free, arguments.dataloader_prefetch_factor or AHEAD
    need = asked * wanted * batch
    if need <= room:
        return None
    fitting = min(asked, int(room / batch))  # of which each is one batch ahead
    arguments.dataloader_num_workers = fitting
    arguments.dataloader_prefetch_factor = 1 if fitting else None
    arguments.dataloader_persistent_workers &= fitting > 0
    return (
        f"{fitting} of {asked} processes open pictures, with one batch ahead in the place of "
        f"{wanted}: {SHARED} has no room for more; {need / USED_SHARE / GIB:.2f} GiB of it would "
        "do (of a container: --shm-size)"
    )


def sample_bytes(halves: Halves) -> int:
    """Bytes of the tensors of the sample with most pictures; at least one."""
    samples = halves.train
    assert isinstance(samples, SampleDataset), "packed samples are known"
    sample = samples[int(samples.image_counts.argmax())]
    return sum(v.nbytes for v in sample.values() if isinstance(v, Tensor)) or 1
