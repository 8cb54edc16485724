"""What a recipe's `trainer:` section and its engine become for the Trainer."""

import os
from pathlib import Path

import pytest
from transformers import TrainingArguments

from vltrain.config import Recipe, load_recipe
from vltrain.training.arguments import step_count, training_arguments
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
