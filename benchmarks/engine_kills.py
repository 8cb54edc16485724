"""One process of a run is killed: how the others end, and whether the same command goes on."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine_bench import (
    CELL_SECONDS,
    ENGINES,
    Bench,
    descendants,
    end_tree,
    environment,
    last_words,
    read_lines,
    recipe,
    run_cell,
)

KILLED_AFTER = 3  # steps; a checkpoint is written every second one
SETTINGS = {"max_steps": 6, "gradient_accumulation_steps": 1, "save_total_limit": 1}
SETTINGS |= {"save_strategy": "steps", "save_steps": 2}
CELLS = ("lora-ddp", "full-zero3", "full-fsdp2", "lora-fsdp2")
"""What is killed: method and engine, in the order of what is wanted most."""


def kill(bench: Bench, cells: Sequence[str]) -> None:
    """`vltrain --gpus N` for some of CELLS, beside an uninterrupted run; adapters are merged.

    A checkpoint of full training is 12 bytes a weight beside the model, so its model is small.
    """
    for name in cells:
        method, engine = name.split("-")
        settings = {**SETTINGS, "base": "base" if method == "lora" else "small"}
        whole = recipe(bench, f"whole-{name}", method, ENGINES[engine], **settings)
        bench.log(run_cell(bench, "train", bench.gpus, whole.stem, str(whole), CELL_SECONDS))
        cut = recipe(bench, f"cut-{name}", method, ENGINES[engine], **settings)
        command = command_of(bench, method, cut)
        bench.log({"cell": f"kill-{name}", **kill_one(bench, command, cut.stem)})
        bench.log({"cell": f"resume-{name}", **resume(bench, command, name)})
        if method == "lora":
            bench.log({"cell": f"merge-{name}", **merge(bench, name)})


def command_of(bench: Bench, method: str, file: Path) -> list[str]:
    """The run of a recipe on all GPUs; on CPUs, which `--gpus` does not take, by torchrun."""
    words = ["-m", "vltrain", method, str(file)]
    if bench.tiny:
        return by_torchrun(bench, words)
    return [sys.executable, *words, "--gpus", str(bench.gpus)]


def launchers(bench: Bench) -> None:
    """The same recipe by `vltrain --gpus N` and by torchrun: how far the losses are apart."""
    losses = []
    for name in ("by-vltrain", "by-torchrun"):
        file = recipe(bench, name, "lora", ENGINES["ddp"], gradient_accumulation_steps=1)
        words = ["-m", "vltrain", "lora", str(file)]
        command = command_of(bench, "lora", file)
        if name == "by-torchrun":
            command = by_torchrun(bench, words)
        done = run_to_end(bench, command)
        rows = read_lines(bench.folder / "runs" / name / "metrics.jsonl")
        losses.append([row["loss"] for row in rows if "loss" in row])
        if done is None or done.returncode:
            why = "took too long" if done is None else done.stderr[-800:]
            bench.log({"cell": name, "error": why})
            return
    apart = [abs(x - y) for x, y in zip(*losses, strict=True)]
    bench.log({"cell": "launchers", "losses": losses[0], "furthest": max(apart)})


def by_torchrun(bench: Bench, words: Sequence[str]) -> list[str]:
    """A module of Python on all processes."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={bench.gpus}"]
    return [sys.executable, *torchrun, *words]


def run_to_end(bench: Bench, command: Sequence[str]) -> subprocess.CompletedProcess[str] | None:
    """What became of a command; None where it took too long."""
    try:
        return subprocess.run(
            command,
            env=environment(bench),
            capture_output=True,
            text=True,
            timeout=bench.limit(CELL_SECONDS),
        )
    except subprocess.TimeoutExpired:
        return None


def resume(bench: Bench, command: Sequence[str], name: str) -> dict[str, Any]:
    """Give the command of a killed run again; how far it is from the uninterrupted one."""
    resumed = run_to_end(bench, command)
    if resumed is None:
        return {"error": "took too long"}
    runs = bench.folder / "runs"
    rows = [read_lines(runs / f"{kind}-{name}" / "metrics.jsonl") for kind in ("whole", "cut")]
    losses = [[row["loss"] for row in of_run if "loss" in row] for of_run in rows]
    apart = [abs(x - y) for x, y in zip(*losses, strict=False)]
    return {
        "exit_code": resumed.returncode,
        "resumed_from": [x for x in resumed.stdout.splitlines() if "resuming" in x],
        "steps": len(losses[1]),
        "furthest_from_uninterrupted": max(apart, default=None),
        "error": resumed.stderr[-800:] if resumed.returncode else "",
    }


def kill_one(bench: Bench, command: Sequence[str], run: str) -> dict[str, Any]:
    """Kill process 1 of a run in the middle; how the others end."""
    log = (bench.folder / "stderr.txt").open("w")
    process = subprocess.Popen(
        command, env=environment(bench), stdout=subprocess.DEVNULL, stderr=log, text=True
    )
    metrics = bench.folder / "runs" / run / "metrics.jsonl"
    until = time.monotonic() + bench.limit(CELL_SECONDS)
    while (
        process.poll() is None
        and len(read_lines(metrics)) < KILLED_AFTER
        and time.monotonic() < until
    ):
        time.sleep(0.1)
    ranks = [pid for pid in descendants(process.pid) if b"\0RANK=1\0" in environ_of(pid)]
    if process.poll() is not None or not ranks:
        end_tree(process)
        return {"error": f"no process to kill: {last_words(bench)}"}
    os.kill(ranks[0], signal.SIGKILL)
    killed = time.monotonic()
    try:
        process.wait(timeout=60)
    except subprocess.TimeoutExpired:
        end_tree(process)
        return {"error": "the others had not stopped after 60 s"}
    said = (bench.folder / "stderr.txt").read_text(errors="replace").strip().splitlines()
    seconds = time.monotonic() - killed
    return {"seconds": seconds, "exit_code": process.returncode, "last_lines": said[-3:]}


def environ_of(pid: int) -> bytes:
    """The environment that a process was started with."""
    try:
        return b"\0" + Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return b""  # it has ended


def merge(bench: Bench, name: str) -> dict[str, Any]:
    """Merge what a resumed run has made."""
    adapter = bench.folder / "runs" / f"cut-{name}" / "final"
    words = ["merge", str(adapter), str(bench.folder / f"merged-{name}")]
    started = time.monotonic()
    done = run_to_end(bench, [sys.executable, "-m", "vltrain", *words])
    if done is None:
        return {"error": "took too long"}
    said = (done.stdout or done.stderr).strip().splitlines()[-1:]
    seconds = time.monotonic() - started
    return {"exit_code": done.returncode, "said": said, "seconds": seconds}
