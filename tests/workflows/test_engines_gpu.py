"""The engines on all GPUs of a machine, under NCCL and in bfloat16, against one GPU."""

import json
from pathlib import Path

import pytest
import torch
from group import train_all
from tiny import write_conversations, write_qwen_vl

from vltrain.config import load_recipe, recipe_to_yaml
from vltrain.models import load_model
from vltrain.training.run_dir import RunDir

pytestmark = pytest.mark.gpu

ENGINES = ("engine=ddp", "deepspeed=zero2", "deepspeed=zero3", "deepspeed=zero3_offload")
ENGINES += ("engine=fsdp2",)
SAMPLES_A_STEP = 8


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen_vl(tmp_path_factory.mktemp("gpu") / "base")


def losses(base: Path, folder: Path, method: str, engine: str, processes: int) -> list[float]:
    """Of four steps of eight samples."""
    share = SAMPLES_A_STEP // processes
    recipe = load_recipe(
        None,
        method=method,
        model=str(base),
        data=[write_conversations(folder / "data")],
        output=folder / f"run-{processes}",
        overrides=[
            "trainer.max_steps=4",
            "trainer.per_device_train_batch_size=1",
            f"trainer.gradient_accumulation_steps={share}",
            "trainer.learning_rate=1e-3",
            "trainer.report_to=none",
            *(["lora.dropout=0"] if method == "lora" else []),
            engine,
        ],
    )
    (folder / "recipe.yaml").write_text(recipe_to_yaml(recipe))
    train_all(processes, [folder / "recipe.yaml"], gpus=True)
    said = json.loads((recipe.output / "environment.json").read_text())
    assert said["engine"] == (
        "deepspeed" if engine.startswith("deepspeed") else engine.removeprefix("engine=")
    )
    assert said["dtype"] == "bf16"
    return [row["loss"] for row in RunDir(recipe.output).read_metrics() if "loss" in row]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("method", ["lora", "full"])
def test_all_gpus_lose_what_one_gpu_loses(base, tmp_path, method, engine):
    processes = min(2, torch.cuda.device_count())
    (tmp_path / "one").mkdir()
    alone = losses(base, tmp_path / "one", method, "engine=ddp", 1)

    together = losses(base, tmp_path, method, engine, processes)

    assert together == pytest.approx(alone, rel=2e-2)
    if method == "full":
        assert load_model(tmp_path / f"run-{processes}" / "final").num_parameters() > 0
