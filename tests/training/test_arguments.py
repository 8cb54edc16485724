"""A run is one process on one card, whatever else the machine has."""

from pathlib import Path

import pytest
from transformers import TrainingArguments

from vltrain.config import Recipe, load_recipe
from vltrain.errors import VltrainError
from vltrain.training.arguments import training_arguments


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


def test_several_processes_are_refused(recipe, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")

    with pytest.raises(VltrainError, match="2 processes were started, and a run is one"):
        training_arguments(recipe)
