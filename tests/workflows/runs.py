"""Short runs on a tiny base, for the tests of every method."""

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from vltrain.config import Recipe, load_recipe
from vltrain.errors import VltrainError
from vltrain.training.run_dir import RunDir
from vltrain.workflows.train import train

QUICK = (
    "trainer.max_steps=6",
    "trainer.per_device_train_batch_size=1",
    "trainer.gradient_accumulation_steps=2",
    "trainer.learning_rate=1e-2",
    "trainer.report_to=none",
)
PACKED = (
    "data.packing=true",
    "data.max_length=270",  # two of the four samples to a row, so an epoch has two rows
    "trainer.gradient_accumulation_steps=1",
)


def quick(base: Path, data: Path, out: Path, *overrides: str, method: str = "lora") -> Recipe:
    """A recipe of six steps; adapters have rank 4."""
    settings = [*QUICK, *([] if method == "full" else ["lora.r=4"]), *overrides]
    return load_recipe(
        None, method=method, model=str(base), data=[data], output=out, overrides=settings
    )


def run(recipe: Recipe) -> str:
    """Train; what was shown."""
    console = Console(file=io.StringIO(), width=200)
    train(recipe, console)
    return console.file.getvalue()


def refused(recipe: Recipe) -> str:
    """The error of a run that is refused, with what was shown before it."""
    console = Console(file=io.StringIO(), width=300)
    with pytest.raises(VltrainError) as error:
        train(recipe, console)
    return console.file.getvalue() + str(error.value)


def metrics(out: Path, key: str = "loss") -> list[tuple[int, float]]:
    """The step and the value of each line of a run's metrics that has the key."""
    return [(row["step"], row[key]) for row in RunDir(out).read_metrics() if key in row]


def weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors files."""
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two folders' tensors have the same names and are equal to the bit."""
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def write_texts(file: Path, *answers: str) -> Path:
    """A data file of one short question for each answer, without pictures."""
    records = [
        {"conversations": [{"from": "user", "value": "?"}, {"from": "assistant", "value": answer}]}
        for answer in answers
    ]
    file.write_text(json.dumps(records))
    return file
