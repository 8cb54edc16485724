"""Shared memory for the batches of processes that open pictures."""

from pathlib import Path

import pytest
from rich.console import Console
from runs import quick, run
from transformers import TrainingArguments

from vltrain.training.arguments import training_arguments
from vltrain.training.engines import NO_ENGINE
from vltrain.workflows import loading_room
from vltrain.workflows.base import read_base, read_halves
from vltrain.workflows.loading_room import batch_bytes, fit_workers
from vltrain.workflows.run_data import Halves
from vltrain.workflows.settle import settled

WORKERS = 4
PICTURE = 3 * 56 * 56 * 4
LARGEST = 3 * PICTURE  # two samples make a step, and one has two pictures


def prepared(base: Path, data: Path, *settings: str) -> tuple[TrainingArguments, Halves]:
    workers = f"trainer.dataloader_num_workers={WORKERS}"
    recipe = settled(quick(base, data, Path("out"), workers, *settings), NO_ENGINE)
    arguments = training_arguments(recipe)
    return arguments, read_halves(Console(quiet=True), recipe, read_base(recipe.model), arguments)


@pytest.mark.parametrize(
    ("batches", "workers", "ahead"),
    [(11, WORKERS, None), (10.9, WORKERS, 1), (7, WORKERS, 1), (6.9, 3, 1), (3.9, 0, None)],
)
def test_as_many_processes_open_pictures_as_there_is_room_for_their_batches(
    base, data, monkeypatch, batches, workers, ahead
):
    arguments, halves = prepared(base, data, "data.row_tokens=4096")
    batch = batch_bytes(halves.train, halves.rows)
    assert LARGEST < batch < 2 * LARGEST
    room = int(batches * batch / loading_room.USED_SHARE) + 1
    monkeypatch.setattr(loading_room, "free_bytes", lambda: room)

    said = fit_workers(arguments, halves)

    assert (said is None) is (ahead is None and workers == WORKERS)
    assert arguments.dataloader_num_workers == workers
    assert arguments.dataloader_prefetch_factor == ahead


@pytest.mark.parametrize("settings", [("data.packing=false",), ("data.packing=true",)])
def test_batches_of_samples_are_left_as_they_are(base, data, monkeypatch, settings):
    arguments, halves = prepared(base, data, *settings)
    monkeypatch.setattr(loading_room, "free_bytes", lambda: 0)

    assert fit_workers(arguments, halves) is None
    assert arguments.dataloader_num_workers == WORKERS


def test_a_run_says_that_it_opens_pictures_in_fewer_processes(base, data, monkeypatch, tmp_path):
    monkeypatch.setattr(loading_room, "free_bytes", lambda: 0)
    workers = "trainer.dataloader_num_workers=1"

    shown = run(quick(base, data, tmp_path / "run", workers, "data.row_tokens=4096"))

    assert "0 of 1 processes open pictures" in shown
    assert "--shm-size" in shown
