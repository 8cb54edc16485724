"""What lies where in a run's directory, and in what state it is.

    RUN/recipe.yaml         the resolved recipe; it makes the directory a run's
    RUN/environment.json    versions, hardware, the base
    RUN/data.json           what the data were when it began: sizes and hashes
    RUN/metrics.jsonl       one object for each logged step
    RUN/runs/               the same for TensorBoard
    RUN/checkpoint-N/       weights, optimizer and random state after step N
    RUN/loss.png            the curve, drawn at the end
    RUN/final/              the adapter or model; it is there whole or not at all

    RUN/run.lock            held while the run goes on

What is whole was written beside its place and renamed; a line that was cut off is passed over in
reading. So a run may be killed at any time.
"""

import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from vltrain import __version__
from vltrain.config import Recipe, read_resolved, recipe_to_yaml
from vltrain.errors import VltrainError
from vltrain.training.checkpoints import clear_drafts, last_whole
from vltrain.training.files import PARTIAL, write_whole
from vltrain.training.lock import LOCK

RunState = Literal["new", "resumable", "finished"]

PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "tokenizers",
    "safetensors",
    "tiktoken",
    "numpy",
    "pillow",
    "bitsandbytes",
    "deepspeed",
    "liger-kernel",
)
"""Whose versions `environment.json` names, where they are installed."""


class RunDir:
    """One run's directory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe_file = path / "recipe.yaml"
        self.environment_file = path / "environment.json"
        self.data_file = path / "data.json"
        self.metrics_file = path / "metrics.jsonl"
        self.loss_plot = path / "loss.png"
        self.final = path / "final"
        self.final_draft = path / f"final{PARTIAL}"  # where to save before `mark_finished`

    @property
    def is_finished(self) -> bool:
        """Whether the final weights are there."""
        return self.final.is_dir()

    def state(self, recipe: Recipe) -> RunState:
        """What the directory is to a run of `recipe`; nothing is written yet.

        Raises:
            VltrainError: the directory holds a run of another recipe (with the keys that
                differ), or files that no run wrote.
        """
        if self.recipe_file.is_file():
            self._refuse_another(recipe)
            return "finished" if self.is_finished else "resumable"
        self._refuse_foreign_files()
        return "new"

    def begin(self, recipe: Recipe, environment: Mapping[str, Any]) -> None:
        """Take the directory for a run, or take it up again: recipe.yaml and environment.json.

        Args:
            recipe: the resolved one.
            environment: see `environment`.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self.final_draft, ignore_errors=True)
        clear_drafts(self.path)
        if not self.recipe_file.is_file():
            write_whole(self.recipe_file, recipe_to_yaml(recipe))
        text = json.dumps(environment, indent=2, ensure_ascii=False)
        write_whole(self.environment_file, text + "\n")

    def refuse_another_engine(self, engine: str, zero_stage: int | None) -> None:
        """Raise VltrainError where the checkpoints are of an engine that this one cannot read.

        One process and DDP write the same. The recipe's `engine: auto` may come to another
        engine on another machine.
        """
        if not self.environment_file.is_file() or self.last_checkpoint() is None:
            return
        there = json.loads(self.environment_file.read_text(encoding="utf-8"))
        alike = {"none": "ddp"}
        before = (alike.get(there["engine"], there["engine"]), there["zero_stage"])
        if before != (alike.get(engine, engine), zero_stage):
            said = before[0] if before[1] is None else f"{before[0]} (ZeRO-{before[1]})"
            raise VltrainError.at(
                str(self.path),
                what=f"its checkpoints are of {said}, and this run would be under another engine",
                fix="resume on a machine like the first, or give another --output",
            )

    def mark_finished(self) -> None:
        """Give what was saved in `final_draft` its name: the run is over."""
        os.replace(self.final_draft, self.final)

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint that is whole; others are passed over with a warning."""
        return last_whole(self.path)

    def read_data_fingerprint(self) -> dict[str, Any] | None:
        """What the run's data were when it began; None where that is not known."""
        if not self.data_file.is_file():
            return None
        return json.loads(self.data_file.read_text(encoding="utf-8"))

    def keep_data_fingerprint(self, fingerprint: Mapping[str, Any]) -> None:
        """Write down what the data are; of a run that goes on only by what files are known."""
        kept = self.read_data_fingerprint()
        stamps = fingerprint.get("stamps", {})
        if kept is None:
            kept = dict(fingerprint)
        elif kept.get("stamps", {}) == stamps:
            return
        text = json.dumps({**kept, "stamps": stamps}, indent=2, ensure_ascii=False)
        write_whole(self.data_file, text + "\n")

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Add one line to metrics.jsonl; floats are written so that they read back exactly.

        What is NaN or infinite becomes null: JSON has no word for it.
        """
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in row.items()
        }
        with self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite, ensure_ascii=False, allow_nan=False) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; a last one that was cut off is left out."""
        if not self.metrics_file.is_file():
            return []
        lines = self.metrics_file.read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines[:-1]]  # a whole line ends with a newline

    def cut_metrics(self, last_step: int) -> None:
        """Drop the lines after `last_step`: a run that resumes there writes them again."""
        kept = [row for row in self.read_metrics() if row["step"] <= last_step]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
        write_whole(self.metrics_file, text)

    def _refuse_another(self, recipe: Recipe) -> None:
        there = read_resolved(self.recipe_file)
        differences = recipe_differences(there, recipe)
        if differences:
            raise VltrainError.at(
                str(self.path),
                what="holds a run of another recipe: " + ", ".join(differences),
                fix="give another --output; or go on with the run that is there: "
                f"vltrain {there.method} {self.recipe_file}",
            )

    def _refuse_foreign_files(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise VltrainError.at(
                str(self.path), what="is a file, not a directory", fix="give another --output"
            )
        found = [p.name for p in self.path.glob("*") if not p.name.endswith(PARTIAL)]
        names = sorted(name for name in found if name != LOCK)
        if names:
            shown = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
            raise VltrainError.at(
                str(self.path),
                what=f"is not empty and holds no run ({shown})",
                fix="give another --output, or empty the directory",
            )


def recipe_differences(there: Recipe, here: Recipe) -> list[str]:
    """Which keys of two recipes differ, with both values.

    Where a run lies does not count, nor where it keeps what it can make again.
    """
    ours, theirs = _flat(asdict(here)), _flat(asdict(there))
    keys = [
        key for key in dict.fromkeys([*theirs, *ours]) if key not in ("output", "data.cache_dir")
    ]
    unset = object()
    return [
        f"{key} ({_shown(theirs, key)} there, {_shown(ours, key)} here)"
        for key in keys
        if ours.get(key, unset) != theirs.get(key, unset)
    ]


def environment(
    *,
    dtype: str,
    base: Mapping[str, Any],
    engine: str = "none",
    zero_stage: int | None = None,
    world_size: int = 1,
    epoch: str,
) -> dict[str, Any]:
    """What a run stands on: `environment.json`.

    Args:
        dtype: of the weights, "bf16" and the like.
        base: the model that the run begins with, as `vltrain.json` names it: checkpoints lead
            there by its `path` and `hash`.
        engine: "none" for one process, else "ddp", "deepspeed" or "fsdp2".
        zero_stage: of DeepSpeed; None elsewhere.
        world_size: processes, on all machines.
        epoch: what is shown in one, in words.
    """
    return {
        "vltrain": __version__,
        "python": platform.python_version(),
        "packages": _versions(),
        "hardware": _hardware(),
        "engine": engine,
        "zero_stage": zero_stage,
        "world_size": world_size,
        "dtype": dtype,
        "epoch": epoch,
        "base": dict(base),
    }


def _versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue  # an extra that this machine does without
    return versions


def _hardware() -> dict[str, Any]:
    import torch

    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "system": platform.platform(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "gpus": [{"name": gpu.name, "memory_bytes": gpu.total_memory} for gpu in gpus],
        "cuda": torch.version.cuda if gpus else None,
    }


def _cpu_name() -> str:
    """The processor's name; Linux alone keeps it in a file."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
        if found:
            return found[1]
    return platform.processor() or platform.machine()


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"data.max_length": 2048, …} of nested sections."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _shown(values: Mapping[str, Any], key: str) -> str:
    return str(values[key]) if key in values else "unset"
