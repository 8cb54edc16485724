"""Batches that are fetched while the step before is still going on."""

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from vltrain.training.look_ahead import LookingAhead


class Line(nn.Module):
    """Learns one number."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": (self.weight * x - 1).square().mean()}


class Numbers(torch.utils.data.Dataset):
    """The numbers from 0, of which one may be broken; notes what is opened."""

    def __init__(self, log: list[Any], count: int, broken: int | None = None) -> None:
        self.log, self.count, self.broken = log, count, broken

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        if number == self.broken:
            raise ValueError(f"{number} is broken")
        self.log.append(number)
        return {"x": torch.tensor(float(number))}


class Steps(TrainerCallback):
    """Notes where each step ends."""

    def __init__(self, log: list[Any]) -> None:
        self.log = log

    def on_step_end(self, args, state, control, **_):
        self.log.append(f"end {state.global_step}")


def train(
    folder: Path, log: list[Any], numbers: Numbers, trainer=LookingAhead, **settings: Any
) -> Line:
    model = Line()
    options = {"use_cpu": True, "disable_tqdm": True, "report_to": "none", "save_strategy": "no"}
    options |= {"per_device_train_batch_size": 1, "learning_rate": 0.1}
    options |= {"train_sampling_strategy": "sequential"} | settings
    loop = trainer(
        model=model,
        args=TrainingArguments(str(folder), **options),
        train_dataset=numbers,
        callbacks=[Steps(log)],
    )
    loop.remove_callback(PrinterCallback)
    loop.train()
    return model


def test_a_step_is_over_when_the_next_ones_batches_are_there(tmp_path):
    log: list[Any] = []
    train(tmp_path, log, Numbers(log, 6), gradient_accumulation_steps=2, num_train_epochs=1)

    # accelerate's own loader is one batch ahead of what it has given.
    assert log == [0, 1, 2, 3, 4, "end 1", 5, "end 2", "end 3"]


def test_behind_the_last_step_nothing_is_fetched(tmp_path):
    log: list[Any] = []
    train(tmp_path, log, Numbers(log, 9), max_steps=2)

    assert log == [0, 1, 2, "end 1", "end 2"]


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_of_an_epoch_outlives_it(tmp_path, workers):
    before = len(multiprocessing.active_children())
    kept: list[LookingAhead] = []

    class Kept(LookingAhead):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            kept.append(self)

    train(tmp_path, [], Numbers([], 9), Kept, max_steps=2, dataloader_num_workers=workers)

    assert (kept[0]._ahead, kept[0]._asked) == (None, None)
    assert len(multiprocessing.active_children()) == before


def test_an_epoch_that_does_not_divide_evenly_is_read_to_its_end_once(tmp_path):
    counts: list[int] = []

    class Counting(LookingAhead):
        def read_batches(self, *args: Any) -> list[dict[str, Any]]:
            batches = super().read_batches(*args)
            counts.append(len(batches))
            return batches

    train(tmp_path, [], Numbers([], 3), Counting, gradient_accumulation_steps=2, num_train_epochs=3)

    assert counts == [2, 1] * 3


@pytest.mark.parametrize("settings", [{"num_train_epochs": 3}, {"max_steps": 7}])
@pytest.mark.parametrize("accumulation", [1, 2, 3])
@pytest.mark.parametrize("count", [4, 5])
def test_what_is_learned_is_what_transformers_learns(tmp_path, settings, accumulation, count):
    settings |= {"gradient_accumulation_steps": accumulation, "train_sampling_strategy": "random"}

    ours = train(tmp_path, [], Numbers([], count), **settings)
    theirs = train(tmp_path, [], Numbers([], count), transformers.Trainer, **settings)

    assert torch.equal(ours.weight, theirs.weight)
    assert ours.weight != 0


def test_a_sample_that_cannot_be_opened_ends_the_run_behind_the_step_before(tmp_path):
    log: list[Any] = []
    with pytest.raises(ValueError, match="3 is broken"):
        train(
            tmp_path,
            log,
            Numbers(log, 9, broken=3),
            max_steps=6,
            save_strategy="steps",
            save_steps=2,
        )

    assert log == [0, 1, 2, "end 1", "end 2"]
    assert (tmp_path / "checkpoint-2").is_dir()
