"""The engines on one machine's GPUs, against one GPU: losses, a killed process, speed, memory.

    python benchmarks/engines_gpu.py --results engines.jsonl

Losses, kill, resume and merge are those of `vltrain` itself, at real width with 8 decoder and 8
ViT layers (2 and 2 where full training is killed) and a vocabulary of bytes; speed is measured at
the real size, with random weights made on the GPU. Each cell has processes of its own. `--methods`
are those of losses and apart, `--engines` those of all parts but launchers and kill: a part whose
cells do not fit into `--minutes` is run in pieces. One JSON object a cell is printed and written as
soon as it is known; a cell that fails or takes too long is one with `error`, and the others go on.
`--tiny` runs it on CPUs, but for FSDP2, which is for GPUs.
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

from engine_bench import CELL_SECONDS, ENGINES, Bench, recipe, run_cell, write_bases
from engine_kills import CELLS, kill, launchers

PARTS = ("losses", "apart", "launchers", "kill", "speed", "full-speed", "fast-speed", "fast-full")
SPEED_SECONDS = 240  # that a cell of the real size may take, the start included


def differences(cell: dict[str, Any], alone: dict[str, Any] | None) -> dict[str, Any]:
    """A cell with how far its losses are from those of one GPU."""
    if alone is None or "losses" not in cell or "losses" not in alone:
        return cell
    pairs = zip(cell["losses"], alone["losses"], strict=False)
    return cell | {"furthest_from_one_gpu": max(abs(x - y) for x, y in pairs)}


def losses(bench: Bench, methods: Sequence[str], engines: Sequence[str]) -> None:
    """Each method under each engine on several GPUs, against one GPU and the same batches."""
    for method in methods:
        name, share = f"{method}-one", 4 // bench.gpus
        file = recipe(bench, name, method, {}, gradient_accumulation_steps=4)
        alone = run_cell(bench, "train", 1, name, str(file), CELL_SECONDS)
        bench.log(alone)
        for engine in engines:
            name, keys = f"{method}-{engine}", ENGINES[engine]
            file = recipe(bench, name, method, keys, gradient_accumulation_steps=share)
            cell = run_cell(bench, "train", bench.gpus, name, str(file), CELL_SECONDS)
            bench.log(differences(cell, alone))


def apart(bench: Bench, methods: Sequence[str], engines: Sequence[str]) -> None:
    """Fifty steps in which a process often has text alone, and six in which one always has."""
    kinds = {
        "full": ("shares", {"max_steps": 50}),
        "lora": ("apart", {"train_sampling_strategy": "sequential", "data": "ordered.json"}),
    }
    for engine in engines:
        for method in methods:
            kind, steps = kinds[method]
            name = f"{method}-{engine}-{kind}"
            steps = {**steps, "gradient_accumulation_steps": 1}
            file = recipe(bench, name, method, ENGINES[engine], **steps)
            cell = run_cell(bench, "train", bench.gpus, name, str(file), CELL_SECONDS)
            if "losses" in cell:
                cell["steps"] = len(cell["losses"])
                cell["losses"] = [cell["losses"][0], cell["losses"][-1]]
            bench.log(cell)


def speed(
    bench: Bench,
    method: str,
    engines: Sequence[str],
    *,
    fast: bool,
    trace: bool = False,
    kept: float = 1.0,
) -> None:
    """Tokens a second, utilisation and memory at the real size; LoRA beside one GPU's.

    Args:
        fast: in packed steps and compiled; else in batches of one sample.
        trace: say of one step more what a GPU did in it.
        kept: the share that compiled layers keep for the way back.
    """
    wanted = {"method": method, "tokens": 2048, "accumulation": 8, "steps": 3, "toy": bench.tiny}
    wanted |= {"fast": fast, "trace": trace, "kept": kept}
    if bench.tiny:
        wanted |= {"tokens": 300, "accumulation": 2, "steps": 1}
    plan = [("none", 1)] if method == "lora" else []
    alone = None
    for engine, processes in [*plan, *((name, bench.gpus) for name in engines)]:
        name = f"speed-{method}-{engine}{'-fast' * fast}"
        what = json.dumps(wanted | {"engine": engine})
        done = run_cell(bench, "speed", processes, name, what, SPEED_SECONDS)
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
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--kills", nargs="+", choices=CELLS, default=CELLS)
    parser.add_argument("--folder", type=Path, help="for models and runs: 60 GB that are fast")
    parser.add_argument("--trace", action="store_true", help="one step more of each speed, traced")
    parser.add_argument("--kept", type=float, default=1.0, help="share that compiled layers keep")
    parser.add_argument("--tiny", action="store_true", help="a toy model on CPUs")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="engines-", dir=options.folder))
    deadline = time.monotonic() + options.minutes * 60
    bench = Bench(folder, options.results.resolve(), options.tiny, options.gpus, deadline)
    bench.log(versions(bench.gpus))
    if any("speed" not in name and "fast" not in name for name in options.parts):
        write_bases(bench)
    methods, engines = options.methods, options.engines
    shared = [name for name in engines if name in ("zero3", "fsdp2")]
    how = {"trace": options.trace, "kept": options.kept}
    parts = {
        "losses": lambda: losses(bench, methods, engines),
        "apart": lambda: apart(bench, methods, [*shared, *({"ddp"} & {*engines})]),
        "launchers": lambda: launchers(bench),
        "kill": lambda: kill(bench, options.kills),
        "speed": lambda: speed(bench, "lora", engines, fast=False, trace=options.trace),
        "full-speed": lambda: speed(bench, "full", shared, fast=False, trace=options.trace),
        "fast-speed": lambda: speed(bench, "lora", engines, fast=True, **how),
        "fast-full": lambda: speed(bench, "full", shared, fast=True, **how),
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
