"""What a DeepSpeed file decides is said, and what it would quietly undo is refused."""

import json
from pathlib import Path

import pytest

from vltrain.config import load_recipe
from vltrain.errors import VltrainError
from vltrain.training.deepspeed_file import (
    decisions_of_file,
    for_cpu,
    refuse_file_against_recipe,
)
from vltrain.training.engines import Machine, choose_engine, read_deepspeed

ORIGINAL = Path(__file__).parents[1] / "original"
FILE = str(ORIGINAL / "ds_config_zero2.json")


def refuse(*overrides: str, config: dict[str, object] | None = None) -> None:
    recipe = load_recipe(
        None,
        method="lora",
        model="base",
        data=[Path("train.json")],
        output=Path("run"),
        overrides=list(overrides),
    )
    refuse_file_against_recipe(recipe, read_deepspeed(FILE) if config is None else config)


def engine_on(gpu_bytes: int | None) -> dict[str, object]:
    machine = Machine(2, True, gpu_bytes)
    return dict(choose_engine("auto", FILE, machine, lambda: None, ()).config)


def test_on_a_cpu_adamw_is_torchs_and_the_file_is_left_as_it_is():
    before = Path(FILE).read_text()

    config = engine_on(None)

    assert config["optimizer"]["params"]["torch_adam"] is True
    assert config["optimizer"]["params"]["lr"] == "auto"
    assert Path(FILE).read_text() == before


def test_on_a_gpu_the_file_is_taken_as_it_is():
    assert engine_on(80 * 2**30) == json.loads(Path(FILE).read_text())


def test_an_optimizer_for_gpus_is_refused_on_a_cpu():
    with pytest.raises(VltrainError, match="optimizer is Lamb, and this is a CPU"):
        for_cpu({"optimizer": {"type": "Lamb", "params": {"lr": 1e-3}}})


def test_a_file_without_optimizer_and_scheduler_decides_nothing():
    config = {"zero_optimization": {"stage": 2}}

    assert for_cpu(config) == config
    assert list(decisions_of_file(config, cpu=True)) == []
    refuse("lr.language=1e-5", config=config)


@pytest.mark.parametrize(
    ("setting", "key"),
    [
        ("lr.language=1e-5", "lr.language"),
        ("lora.plus=16", "lora.plus"),
        ("trainer.optim=adafactor", "trainer.optim"),
    ],
)
def test_what_the_files_optimizer_and_scheduler_would_undo_is_refused(setting, key):
    with pytest.raises(VltrainError, match=f"^{key}: the DeepSpeed file's `optimizer`"):
        refuse(setting)


def test_the_recipe_of_the_original_goes_with_its_file():
    refuse("trainer.optim=adamw_torch", "trainer.lr_scheduler_type=cosine")
