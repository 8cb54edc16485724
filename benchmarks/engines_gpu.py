"""The engines on one machine's GPUs, against one GPU: losses, a killed process, speed, memory.

    python benchmarks/engines_gpu.py --results engines.jsonl

Losses, kill, resume and merge are those of `vltrain` itself, at real width with 8 decoder and 8
ViT layers (2 and 2 where full training is killed) and a vocabulary of bytes; speed is measured at
the real size, with random weights made on the GPU. `--methods` are those of losses and apart. One
JSON object a cell is printed and written as soon as it is known; a cell that fails or takes too
long is one with `error`, and the others go on. `--tiny` runs all of it on CPUs.
"""

import argparse
import json
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine_bench import ENGINES, Bench, group, recipe, write_base
from engine_kills import CELLS, kill

PARTS = ("losses", "apart", "kill", "speed", "full-speed")


def differences(cell: dict[str, Any], alone: dict[str, Any] | None) -> dict[str, Any]:
    """A cell with how far its losses are from those of one GPU."""
    if alone is None or "losses" not in cell or "losses" not in alone:
        return cell
    pairs = zip(cell["losses"], alone["losses"], strict=False)
    return cell | {"furthest_from_one_gpu": max(abs(x - y) for x, y in pairs)}


def losses(bench: Bench, methods: Sequence[str]) -> None:
    """Each method under each engine on several GPUs, against one GPU and the same batches."""
    alone, together, references = {}, {}, {}
    for method in methods:
        file = recipe(bench, f"{method}-one", method, {}, gradient_accumulation_steps=4)
        alone[f"{method}-one"] = str(file)
    for cell in group(bench, "train", 1, alone, 120):
        references[cell["cell"].split("-")[0]] = cell
        bench.log(cell)
    for engine, keys in ENGINES.items():
        for method in methods:
            name = f"{method}-{engine}"
            share = 4 // bench.gpus
            file = recipe(bench, name, method, keys, gradient_accumulation_steps=share)
            together[name] = str(file)
    for cell in group(bench, "train", bench.gpus, together, 120):
        bench.log(differences(cell, references.get(cell["cell"].split("-")[0])))


def apart(bench: Bench, methods: Sequence[str]) -> None:
    """Fifty steps in which a process often has text alone, and six in which one always has."""
    cells = {}
    for engine in ("zero3", "fsdp2", "ddp"):
        if "full" in methods:
            name = f"full-{engine}-shares"
            steps = {"max_steps": 50, "gradient_accumulation_steps": 1}
            cells[name] = str(recipe(bench, name, "full", ENGINES[engine], **steps))
        if "lora" in methods:
            name = f"lora-{engine}-apart"
            steps = {"train_sampling_strategy": "sequential", "data": "ordered.json"}
            steps |= {"gradient_accumulation_steps": 1}
            cells[name] = str(recipe(bench, name, "lora", ENGINES[engine], **steps))
    for cell in group(bench, "train", bench.gpus, cells, 120):
        if "losses" in cell:
            cell["losses"] = [cell["losses"][0], cell["losses"][-1]]
        bench.log(cell)


def speed(bench: Bench, method: str = "lora", engines: Sequence[str] = tuple(ENGINES)) -> None:
    """Tokens a second and memory at the real size, each engine in processes of its own."""
    wanted = {"method": method, "tokens": 2048, "accumulation": 8, "steps": 3, "toy": bench.tiny}
    if bench.tiny:
        wanted |= {"tokens": 300, "accumulation": 2, "steps": 1}
    plan = [("none", 1)] if method == "lora" else []
    alone = None
    for engine, processes in [*plan, *((name, bench.gpus) for name in engines)]:
        cell = {f"speed-{method}-{engine}": json.dumps(wanted | {"engine": engine})}
        for done in group(bench, "speed", processes, cell, 110):
            if "error" not in done and processes == 1:
                alone = done["tokens_per_second_and_gpu"]
            elif "error" not in done and alone:
                done["efficiency"] = done["tokens_per_second_and_gpu"] / alone
            bench.log(done)


def versions(gpus: int) -> dict[str, Any]:
    """The hardware and what ran on it."""
    import importlib.metadata

    import torch

    names = ("torch", "transformers", "accelerate", "peft", "deepspeed")
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    return {"device": device, "gpus": gpus, "python": platform.python_version(), **found}


def main() -> None:
    """Run the parts that are asked for, in an order in which the cheap come first."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("engines.jsonl"))
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=8.7)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--methods", nargs="+", default=["lora", "full"])
    parser.add_argument("--kills", nargs="+", choices=CELLS, default=CELLS)
    parser.add_argument("--folder", type=Path, help="for models and runs: 60 GB that are fast")
    parser.add_argument("--tiny", action="store_true", help="a toy model on CPUs")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="engines-", dir=options.folder))
    deadline = time.monotonic() + options.minutes * 60
    bench = Bench(folder, options.results.resolve(), options.tiny, options.gpus, deadline)
    bench.log(versions(bench.gpus))
    write_base(bench)
    parts = {
        "losses": lambda: losses(bench, options.methods),
        "apart": lambda: apart(bench, options.methods),
        "kill": lambda: kill(bench, options.kills),
        "speed": lambda: speed(bench),
        "full-speed": lambda: speed(bench, "full", ("zero3", "fsdp2")),
    }
    for name in options.parts:
        started = time.monotonic()
        try:
            parts[name]()
        except (OSError, subprocess.SubprocessError, ValueError, KeyError) as error:
            bench.log({"part": name, "error": repr(error)})
        bench.log({"part": name, "seconds": time.monotonic() - started})
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
