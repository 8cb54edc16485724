"""Whether checkpoints will fit, and what tells that a disk is full."""

import errno
import resource
import signal
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from transformers import TrainingArguments

from vltrain.errors import VltrainError
from vltrain.training.disk import (
    MASTERS,
    SavedBytes,
    refuse_small_disk,
    save_count,
    saved_bytes,
)
from vltrain.training.files import is_disk_full

GIB = 2**30


@pytest.mark.parametrize(
    ("optimizer", "state"), [("adamw_torch_fused", 8), ("adamw_bnb_8bit", 2), ("adafactor", 0)]
)
def test_a_full_run_saves_all_weights_and_the_optimizers_state_of_what_learns(optimizer, state):
    model = nn.Sequential(nn.Linear(10, 10, bias=False), nn.Linear(10, 10, bias=False).bfloat16())
    model[1].weight.requires_grad = False

    size = saved_bytes(model, "none", optimizer)

    assert size == SavedBytes(weights=100 * 4 + 100 * 2, optimizer=100 * state)


def test_weights_with_masters_are_saved_in_float32_and_the_masters_with_both_moments():
    model = nn.Linear(10, 10, bias=False).bfloat16()

    assert saved_bytes(model, "none", MASTERS) == SavedBytes(weights=400, optimizer=1200)


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({"save_strategy": "steps", "save_steps": 4}, 3),  # 4, 8 and the end
        ({"save_strategy": "steps", "save_steps": 0.5}, 2),
        ({"save_strategy": "epoch", "num_train_epochs": 5}, 5),
        ({"save_strategy": "no"}, 1),  # should the run be stopped
    ],
)
def test_checkpoints_are_counted_by_the_steps_between_them(settings, count):
    arguments = TrainingArguments(use_cpu=True, report_to="none", **settings)

    assert save_count(arguments, steps=10) == count


def test_a_run_whose_checkpoints_will_not_fit_is_refused_with_how_many_would(tmp_path, free):
    size = SavedBytes(weights=2 * GIB, optimizer=4 * GIB)  # 6 GiB a checkpoint
    free(30 * GIB)

    with pytest.raises(VltrainError) as error:
        refuse_small_disk(tmp_path / "runs" / "a", size, keep=10, saves=50)

    assert str(error.value) == (
        f"{tmp_path}/runs/a: 11 checkpoints of 6.0 GiB and final weights of 2.0 GiB do not fit: "
        "30.0 GiB are free\n"
        "  fix: lower trainer.save_total_limit to 3, make space, or give another --output"
    )


@pytest.mark.parametrize(("keep", "saves"), [(3, 50), (10, 4), (None, 4)])
def test_a_run_whose_checkpoints_just_fit_is_not_refused(tmp_path, free, keep, saves):
    free(26 * GIB)  # four checkpoints, the last of them before the first is deleted, and the end

    refuse_small_disk(tmp_path, SavedBytes(2 * GIB, 4 * GIB), keep=keep, saves=saves)

    free(26 * GIB - 1)
    with pytest.raises(VltrainError, match="do not fit"):
        refuse_small_disk(tmp_path, SavedBytes(2 * GIB, 4 * GIB), keep=keep, saves=saves)


def test_checkpoints_that_are_there_count_as_space(tmp_path: Path, free):
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "checkpoint-4" / "optimizer.pt").write_bytes(bytes(600))
    free(800)

    refuse_small_disk(tmp_path, SavedBytes(200, 400), keep=1, saves=2)  # 2 x 600 + 200


def test_an_error_of_a_full_disk_is_told_from_others():
    assert is_disk_full(OSError(errno.ENOSPC, "No space left on device"))
    assert is_disk_full(OSError(errno.EDQUOT, "Disk quota exceeded"))
    assert not is_disk_full(OSError(errno.ENOENT, "No such file or directory"))
    assert not is_disk_full(RuntimeError("CUDA error"))


def write_under_a_limit(write, path: Path, told) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    try:
        write({"a": torch.empty(100_000)}, path)  # to fill it would wait for threads of the parent
    except (OSError, RuntimeError, SafetensorError) as error:
        told.put((str(error), is_disk_full(error)))
    else:
        told.put(("nothing was raised", False))


@pytest.mark.parametrize("write", [torch.save, save_file])
def test_what_torch_and_safetensors_raise_where_no_more_can_be_written_is_known(write, tmp_path):
    fork = get_context("fork")  # the limit holds for a whole process
    told = fork.Queue()
    process = fork.Process(target=write_under_a_limit, args=(write, tmp_path / "a", told))
    process.start()

    message, known = told.get(timeout=30)

    process.join()
    assert known, message
