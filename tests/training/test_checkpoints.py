"""Which checkpoints are whole, which one a run goes on from, and which are deleted."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vltrain.training.checkpoints import (
    checkpoint_fault,
    checkpoints,
    clear_drafts,
    last_whole,
    publish,
    remove,
    rotate,
)

OF_A_CHECKPOINT = (
    "adapter_model.safetensors",
    "optimizer.pt",
    "rng_state.pth",
    "scheduler.pt",
    "trainer_state.json",
    "global_step8/mp_rank_00_model_states.pt",
)


def write_checkpoint(run: Path, step: int) -> Path:
    """What the Trainer and DeepSpeed write, published."""
    draft = run / "draft"
    (draft / "global_step8").mkdir(parents=True)
    for name in OF_A_CHECKPOINT:
        if name.endswith(".json"):
            (draft / name).write_text(json.dumps({"global_step": step}))
        elif name.endswith(".safetensors"):
            save_file({"lora_A": torch.ones(4, 8)}, draft / name)
        else:
            torch.save({"state": torch.ones(100)}, draft / name)
    (draft / "README.md").write_text("peft's model card")
    publish(draft, run / f"checkpoint-{step}")
    return run / f"checkpoint-{step}"


def names(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir())


def test_the_last_checkpoint_is_the_one_with_the_highest_step(tmp_path: Path):
    write_checkpoint(tmp_path, 900)
    newest = write_checkpoint(tmp_path, 1000)

    assert last_whole(tmp_path) == newest
    assert names(tmp_path) == ["checkpoint-1000", "checkpoint-900"]


def test_a_run_without_checkpoints_has_no_last_one(tmp_path: Path):
    assert last_whole(tmp_path) is None


def test_a_broken_checkpoint_is_passed_over_with_a_warning(tmp_path: Path, caplog):
    whole = write_checkpoint(tmp_path, 4)
    (write_checkpoint(tmp_path, 8) / "optimizer.pt").unlink()

    assert last_whole(tmp_path) == whole
    assert "checkpoint-8 is passed over: optimizer.pt is missing" in caplog.text


@pytest.mark.parametrize("name", OF_A_CHECKPOINT)
def test_every_file_of_a_checkpoint_must_be_there_in_its_size(tmp_path: Path, name: str):
    checkpoint = write_checkpoint(tmp_path, 8)
    assert checkpoint_fault(checkpoint) is None

    size = (checkpoint / name).stat().st_size
    (checkpoint / name).write_bytes((checkpoint / name).read_bytes()[:-5])
    assert checkpoint_fault(checkpoint) == f"{name} has {size - 5:,} bytes of {size:,}"

    (checkpoint / name).unlink()
    assert checkpoint_fault(checkpoint) == f"{name} is missing"


@pytest.mark.parametrize("name", OF_A_CHECKPOINT)
def test_a_file_of_which_only_the_size_is_right_does_not_open(tmp_path: Path, name: str):
    checkpoint = write_checkpoint(tmp_path, 8)
    file = checkpoint / name
    file.write_bytes(bytes(file.stat().st_size))

    assert checkpoint_fault(checkpoint).startswith(f"{name} does not open (")


def test_what_was_not_published_is_no_checkpoint(tmp_path: Path):
    checkpoint = write_checkpoint(tmp_path, 8)
    (checkpoint / "manifest.json").unlink()

    assert "no manifest.json" in checkpoint_fault(checkpoint)


def test_a_model_card_may_be_changed(tmp_path: Path):
    checkpoint = write_checkpoint(tmp_path, 8)
    (checkpoint / "README.md").unlink()

    assert checkpoint_fault(checkpoint) is None


def test_a_checkpoint_replaces_the_broken_one_of_its_step(tmp_path: Path):
    (write_checkpoint(tmp_path, 8) / "optimizer.pt").unlink()

    checkpoint = write_checkpoint(tmp_path, 8)

    assert checkpoint_fault(checkpoint) is None
    assert names(tmp_path) == ["checkpoint-8"]


def test_what_kills_left_of_writing_and_deleting_is_cleared(tmp_path: Path):
    whole = write_checkpoint(tmp_path, 4)
    (tmp_path / "checkpoint.partial" / "checkpoint-8").mkdir(parents=True)
    (tmp_path / "checkpoint-2.partial").mkdir()

    clear_drafts(tmp_path)

    assert names(tmp_path) == [whole.name]


def test_a_deleted_checkpoint_leaves_nothing(tmp_path: Path):
    remove(write_checkpoint(tmp_path, 4))

    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [
        (None, None, [1, 2, 3, 4]),
        (0, None, [1, 2, 3, 4]),
        (9, None, [1, 2, 3, 4]),
        (3, None, [2, 3, 4]),
        (1, None, [4]),
        (2, 1, [1, 4]),
        (1, 1, [1, 4]),
        (3, 4, [2, 3, 4]),
    ],
)
def test_the_oldest_go_but_neither_the_newest_nor_the_best(tmp_path: Path, keep, best, left):
    written = {step: write_checkpoint(tmp_path, step) for step in (1, 2, 3, 4)}

    rotate(written[4], keep=keep, best=None if best is None else written[best])

    assert checkpoints(tmp_path) == [written[step] for step in left]


def test_nothing_is_deleted_behind_a_checkpoint_that_is_not_whole(tmp_path: Path, caplog):
    older = write_checkpoint(tmp_path, 4)
    newest = write_checkpoint(tmp_path, 8)
    (newest / "optimizer.pt").unlink()

    rotate(newest, keep=1)

    assert last_whole(tmp_path) == older
    assert "no older checkpoint is deleted" in caplog.text


def test_a_broken_checkpoint_of_a_later_step_costs_no_good_one_its_place(tmp_path: Path):
    # A run whose checkpoint-8 broke went on from 4 and was stopped at 6.
    write_checkpoint(tmp_path, 4)
    (write_checkpoint(tmp_path, 8) / "optimizer.pt").unlink()
    newest = write_checkpoint(tmp_path, 6)

    rotate(newest, keep=1)

    assert last_whole(tmp_path) == newest
    assert names(tmp_path) == ["checkpoint-6", "checkpoint-8"]
