"""The engines on all GPUs of a machine, under NCCL and in bfloat16, against one GPU."""

import json
from pathlib import Path

import pytest
import torch
from group import train_all
from runs import metrics, weights
from tiny import write_conversations, write_qwen_vl

from vltrain.config import Recipe, load_recipe, recipe_to_yaml
from vltrain.models import load_model

pytestmark = pytest.mark.gpu

ENGINES = {
    "ddp": "engine=ddp",
    "zero2": "deepspeed=zero2",
    "zero3": "deepspeed=zero3",
    "zero3_offload": "deepspeed=zero3_offload",
    "fsdp2": "engine=fsdp2",
}
METHODS = ("lora", "full")
PLAIN = ("compile=false", "memory=null", "data.packing=false")
SAMPLES_A_STEP = 8


def recipe_of(folder: Path, name: str, method: str, processes: int, *settings: str) -> Recipe:
    """Four steps of eight samples."""
    share = SAMPLES_A_STEP // processes
    overrides = [
        "trainer.max_steps=4",
        "trainer.per_device_train_batch_size=1",
        f"trainer.gradient_accumulation_steps={share}",
        "trainer.learning_rate=1e-3",
        "trainer.report_to=none",
        *(["lora.dropout=0"] if method == "lora" else []),
        *settings,
    ]
    return load_recipe(
        None,
        method=method,
        model=str(folder / "base"),
        data=[folder / "train.json"],
        output=folder / name,
        overrides=overrides,
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base, data, and the plain runs of one GPU."""
    folder = tmp_path_factory.mktemp("gpus")
    write_qwen_vl(folder / "base")
    write_conversations(folder)
    train_in_turn(1, [recipe_of(folder, f"one-{m}", m, 1, "engine=ddp", *PLAIN) for m in METHODS])
    return folder


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: pytest.FixtureRequest, place: Path) -> str:
    """An engine, whose own way with both methods has run, on two GPUs where there are as many."""
    name, processes = request.param, min(2, torch.cuda.device_count())
    recipes = [recipe_of(place, f"{name}-{m}", m, processes, ENGINES[name]) for m in METHODS]
    train_in_turn(processes, recipes)
    return name


def train_in_turn(processes: int, recipes: list[Recipe]) -> None:
    """Run recipes one after the other in one group of processes."""
    files = [recipe.output.with_suffix(".yaml") for recipe in recipes]
    for file, recipe in zip(files, recipes, strict=True):
        file.write_text(recipe_to_yaml(recipe))
    train_all(processes, files, gpus=True)


@pytest.mark.parametrize("method", METHODS)
def test_all_gpus_lose_what_one_gpu_loses(place, engine, method):
    together, alone = metrics(place / f"{engine}-{method}"), metrics(place / f"one-{method}")

    assert [step for step, _ in together] == [step for step, _ in alone] == [1, 2, 3, 4]
    assert [x for _, x in together] == pytest.approx([x for _, x in alone], rel=2e-2)


@pytest.mark.parametrize("method", METHODS)
def test_the_environment_names_the_engine_and_its_dtype(place, engine, method):
    said = json.loads((place / f"{engine}-{method}" / "environment.json").read_text())

    stage = int(engine[4]) if engine.startswith("zero") else None
    if engine == "ddp" and torch.cuda.device_count() == 1:
        engine = "none"  # of one process there is nothing to reduce
    assert said["engine"] == ("deepspeed" if stage else engine)
    assert said["zero_stage"] == stage
    assert said["dtype"] == "bf16"


def test_a_full_model_is_saved_whole(place, engine):
    final = place / f"{engine}-full" / "final"

    assert weights(final).keys() == weights(place / "base").keys()
    ids = torch.arange(0, 96)[None]
    ours, theirs = (
        load_model(folder, dtype="fp32")(ids).logits
        for folder in (final, place / "one-full" / "final")
    )
    assert (ours - theirs).abs().max() < 0.1 * theirs.abs().max()


def test_an_adapter_is_saved_whole(place, engine):
    ours, theirs = (weights(place / f"{run}-lora" / "final") for run in (engine, "one"))

    assert ours.keys() == theirs.keys()
    assert all(tensor.isfinite().all() for tensor in ours.values())
