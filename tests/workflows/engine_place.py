"""A base, data and recipes for runs of several processes, and how they are started."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from group import train_all
from tiny import write_conversations, write_qwen_vl

from vltrain.config import Recipe, load_recipe, recipe_to_yaml
from vltrain.training.run_dir import RunDir

COMMON = (
    "trainer.max_steps=6",
    "trainer.per_device_train_batch_size=1",
    "trainer.learning_rate=1e-3",
    "trainer.lr_scheduler_type=constant",
    "trainer.report_to=none",
)
LORA = ("lora.r=4", "lora.dropout=0")


@dataclass(frozen=True)
class Place:
    """Where the runs of this file find their base and data, and where they lie."""

    base: Path
    data: Path
    odd: Path  # the first five records of it
    runs: Path

    def recipe(self, name: str, method: str, *overrides: str, data: Path | None = None) -> Recipe:
        """A run of that name; with adapters, small ones without dropout."""
        settings = [*COMMON, *(LORA if method == "lora" else ()), *overrides]
        return load_recipe(
            None,
            method=method,
            model=str(self.base),
            data=[data or self.data],
            output=self.runs / name,
            overrides=settings,
        )

    def evaluation(self, steps: int) -> tuple[str, ...]:
        """Settings: after so many steps five samples are evaluated, two at once by a process."""
        how = ("trainer.eval_strategy=steps", f"trainer.eval_steps={steps}")
        return (f"data.eval_files=[{self.odd}]", "trainer.per_device_eval_batch_size=2", *how)


def make_place(folder: Path) -> Place:
    """Sixteen records: every second one has pictures, the others are text alone."""
    seen = json.loads(write_conversations(folder).read_text(encoding="utf-8"))
    records = []
    for number in range(8):
        turns = [("user", f"Say {number}."), ("assistant", f"It is {number}, " * (number + 1))]
        text = {"conversations": [{"from": who, "value": words} for who, words in turns]}
        records += [seen[number % 4], text]
    data = folder / "mixed.json"
    data.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    odd = folder / "odd.json"
    odd.write_text(json.dumps(records[:5], ensure_ascii=False), encoding="utf-8")
    return Place(write_qwen_vl(folder / "base"), data, odd, folder / "runs")


def run_together(processes: int, recipes: Sequence[Recipe], folder: Path) -> str:
    """Train recipes in one group of processes; what was shown.

    Args:
        processes: how many.
        recipes: one after the other.
        folder: for their files.
    """
    files = []
    for recipe in recipes:
        files.append(folder / f"{recipe.output.name}.yaml")
        files[-1].write_text(recipe_to_yaml(recipe), encoding="utf-8")
    return train_all(processes, files).stdout


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in RunDir(run).read_metrics() if "loss" in row]


def eval_losses(run: Path) -> list[float]:
    return [row["eval_loss"] for row in RunDir(run).read_metrics() if "eval_loss" in row]
