"""The `trainer:` section of a recipe: what the Trainer takes of it."""

from pathlib import Path

import pytest
import torch
from runs import quick

from vltrain.config import load_recipe
from vltrain.errors import VltrainError
from vltrain.training.arguments import training_arguments


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.learning_rat=1", "did you mean `trainer.learning_rate`?"),
        ("trainer.max_grad_nrom=1", "did you mean `trainer.max_grad_norm`?"),
        ('trainer.learning_rate="1e-4"', '`trainer.learning_rate` is "1e-4"'),
        ("trainer.save_steps=often", "`trainer.save_steps` is "),
        ("trainer.per_device_train_batch_size=1.5", "should be a valid integer"),
        ("trainer.num_train_epochs=null", "should be a valid number"),
        ("trainer.weight_decay=true", "should be a valid number"),
        ("trainer.gradient_accumulation_steps=0", "should be greater than or equal to 1"),
        ("trainer.report_to=nothing", "nothing is not supported"),
        ("trainer.optim=adamz", "adamz is not a valid OptimizerNames"),
        ("dtype=fp16", "fp16 trains on a GPU only"),
    ],
)
def test_what_the_trainer_does_not_take_is_refused(base, data, tmp_path, override, message):
    if "fp16" in override and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(VltrainError) as error:
        training_arguments(quick(base, data, tmp_path / "run", override))

    assert message in str(error.value)


def test_all_values_of_a_wrong_type_are_told_together(base, data, tmp_path):
    wrong = ("trainer.seed=x", "trainer.learning_rate=[1]")

    with pytest.raises(VltrainError, match=r"(?s)trainer\.seed.*trainer\.learning_rate"):
        training_arguments(quick(base, data, tmp_path / "run", *wrong))


@pytest.mark.parametrize("method", ["lora", "full"])
def test_every_built_in_default_is_taken_by_the_trainer(method, tmp_path):
    recipe = load_recipe(
        None, method=method, model="base", data=[Path("train.json")], output=tmp_path / "run"
    )

    arguments = training_arguments(recipe)

    assert arguments.learning_rate == (1e-4 if method == "lora" else 1e-5)
    assert arguments.gradient_accumulation_steps == (8 if method == "lora" else 16)
    assert (arguments.weight_decay, arguments.adam_beta2) == (0.1, 0.95)
    assert arguments.remove_unused_columns is False
