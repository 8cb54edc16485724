"""What a recipe's `trainer:` section and its engine become for the Trainer."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import TrainingArguments

from vltrain.config import Recipe, load_recipe
from vltrain.training import arguments
from vltrain.training.arguments import (
    _implied_copies,
    loading_workers,
    step_count,
    training_arguments,
)
from vltrain.training.engines import Engine


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return load_recipe(
        None, method="lora", model="a", data=[tmp_path / "b.json"], output=tmp_path / "run"
    )


def test_a_second_card_is_left_alone(recipe, monkeypatch):
    make = TrainingArguments.__post_init__

    def make_with_two_cards(arguments: TrainingArguments) -> None:
        make(arguments)
        arguments._n_gpu = 2  # what transformers counts on such a machine

    monkeypatch.setattr(TrainingArguments, "__post_init__", make_with_two_cards)

    assert training_arguments(recipe).n_gpu == 1


def test_a_launcher_that_wants_another_engine_is_not_listened_to(recipe, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # makes DDP of DeepSpeed
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")

    training_arguments(recipe)

    assert not {"ACCELERATE_USE_CPU", "ACCELERATE_USE_FSDP"} & os.environ.keys()


def test_under_ddp_nothing_is_searched_for_unused_weights(recipe):
    arguments = training_arguments(recipe, Engine("ddp", "a test"))

    assert arguments.ddp_find_unused_parameters is False


@pytest.mark.parametrize(
    ("samples", "processes", "steps"),
    [(8, 1, 4), (8, 2, 2), (9, 2, 3), (5, 4, 1)],  # 2 samples a step and process
)
def test_an_epoch_has_fewer_steps_on_more_processes(recipe, monkeypatch, samples, processes, steps):
    arguments = training_arguments(recipe)
    arguments.gradient_accumulation_steps, arguments.num_train_epochs = 2, 1
    monkeypatch.setattr(TrainingArguments, "world_size", processes)

    assert step_count(arguments, samples) == steps


@pytest.mark.parametrize(
    ("there", "trainer", "pinned"),
    [(True, {}, True), (True, {"dataloader_pin_memory": False}, False), (False, {}, False)],
)
def test_from_pinned_memory_batches_are_copied_while_the_host_goes_on(
    monkeypatch, there, trainer, pinned
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: there)

    implied = TrainingArguments("out", use_cpu=True, **_implied_copies(trainer))

    assert implied.accelerator_config.non_blocking == pinned


def test_what_a_recipe_says_of_copies_holds(recipe, monkeypatch):
    copies = {"accelerator_config": {"non_blocking": True}}
    monkeypatch.setattr("vltrain.training.arguments._implied_copies", lambda _: copies)
    said = {"accelerator_config": {"non_blocking": False}}
    arguments = training_arguments(replace(recipe, trainer=recipe.trainer | said))

    assert not arguments.accelerator_config.non_blocking


@pytest.mark.parametrize(
    ("gpu", "cores", "processes", "trainer", "workers"),
    [
        (True, 16, 1, {}, 4),
        (True, 16, 8, {}, 1),
        (True, 2, 2, {}, 0),
        (True, 16, 1, {"dataloader_num_workers": 9}, 9),
        (False, 16, 1, {}, 0),
    ],
)
def test_beside_a_gpu_processes_open_pictures_as_far_as_there_are_cores(
    monkeypatch, gpu, cores, processes, trainer, workers
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    monkeypatch.setattr(arguments, "usable_cores", lambda: cores)
    for key, value in (("LOCAL_RANK", 0), ("WORLD_SIZE", processes)):
        monkeypatch.setenv(key, str(value))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))

    assert loading_workers(trainer) == workers
