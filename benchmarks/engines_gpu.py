"""The engines on one machine's GPUs, against one GPU: losses, a killed process, speed, memory.

    python benchmarks/engines_gpu.py --results engines.jsonl

Losses, kill, resume and merge are those of `vltrain` itself, at real width with 8 decoder and 8
ViT layers and a vocabulary of bytes; speed is measured at the real size, with random weights made
on the GPU. One JSON object a cell is printed and written as soon as it is known; a cell that fails
or takes too long is one with `error`, and the others go on. `--tiny` runs all of it on CPUs.
"""

import argparse
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

WIDE = {  # the published widths
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "kv_channels": 128,
    "num_hidden_layers": 8,
    "intermediate_size": 22016,
    "seq_length": 2048,
}
WIDE_VISION = {
    "heads": 16,
    "image_size": 448,
    "layers": 8,
    "mlp_ratio": 4.9231,
    "n_queries": 256,
    "output_dim": 4096,
    "width": 1664,
}
ENGINES = {
    "ddp": {"engine": "ddp"},
    "zero2": {"deepspeed": "zero2"},
    "zero3": {"deepspeed": "zero3"},
    "fsdp2": {"engine": "fsdp2"},
}
STEPS = 6
KILLED_STEPS = 12
PARTS = ("losses", "apart", "kill", "speed", "full-speed")


@dataclass(frozen=True)
class Bench:
    """Where it all lies, how large it is, and until when it may run."""

    folder: Path
    results: Path
    tiny: bool
    gpus: int
    deadline: float  # of time.monotonic

    def log(self, cell: dict[str, Any]) -> None:
        """Print a result, and keep it."""
        print(json.dumps(cell), flush=True)
        with self.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(cell) + "\n")

    def limit(self, seconds: float) -> float:
        """Seconds that a cell may take: no more than are left."""
        return max(1.0, min(seconds, self.deadline - time.monotonic()))


def write_base(bench: Bench) -> None:
    """The model, and records of which every second one, in random order, has a picture."""
    import tiny
    import torch
    from PIL import Image

    config = dict(tiny.QWEN_VL_CONFIG)
    if not bench.tiny:
        config |= WIDE | {"torch_dtype": "bfloat16"}
        config["visual"] = config["visual"] | WIDE_VISION
    with torch.device("cpu" if bench.tiny else "cuda"):
        tiny.write_qwen_vl(bench.folder / "base", config=config)
    chance = random.Random(0)
    records = []
    for number in range(400):
        question = "".join(chance.choices("abcdefgh ", k=chance.randint(20, 200)))
        if number % 2:
            color = tuple(chance.randrange(256) for _ in range(3))
            Image.new("RGB", (64, 64), color).save(bench.folder / f"{number}.png")
            question = f"Picture 1: <img>{bench.folder / f'{number}.png'}</img>\n{question}"
        answer = "".join(chance.choices("xyz ", k=chance.randint(10, 100)))
        turns = [{"from": "user", "value": question}, {"from": "assistant", "value": answer}]
        records.append({"id": str(number), "conversations": turns})
    (bench.folder / "ordered.json").write_text(json.dumps(records))
    chance.shuffle(records)
    (bench.folder / "data.json").write_text(json.dumps(records))


def recipe(bench: Bench, name: str, method: str, engine: dict[str, str], **trainer: Any) -> Path:
    """The file of a run; its directory has the same name."""
    data = bench.folder / trainer.pop("data", "data.json")
    values: dict[str, Any] = {
        "method": method,
        "model": str(bench.folder / "base"),
        "output": str(bench.folder / "runs" / name),
        "data": {"files": [str(data)], "max_length": 1024},
        **engine,
        "memory_check": False,  # what does not fit is a result too
        "trainer": {
            "max_steps": STEPS,
            "per_device_train_batch_size": 1,
            "learning_rate": 1e-4 if method == "lora" else 1e-5,  # more, and wide models diverge
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            **trainer,
        },
    }
    if method == "lora":
        values["lora"] = {"dropout": 0.0, "r": 16}
    file = bench.folder / f"{name}.yaml"
    file.write_text(json.dumps(values))
    return file


def group(
    bench: Bench, kind: str, processes: int, cells: dict[str, str], seconds: float
) -> Iterator[dict[str, Any]]:
    """Cells in one start of torchrun; after a cell that fails, a new start for those behind it.

    Args:
        kind: of cell, as `engine_cells.py` knows them.
        processes: of the group; one runs by itself.
        cells: by name, what stands for each on the command line.
        seconds: that a cell may take, the start included.
    """
    left = dict(cells)
    while left and bench.limit(1e9) > 5:
        own = bench.folder / "group.jsonl"
        own.unlink(missing_ok=True)
        error = watch(bench, start(bench, kind, processes, own, left.values()), own, seconds)
        for done in read_lines(own):
            left.pop(next(iter(left)))
            yield done
        if left and error:
            yield {"cell": take_first(left), "error": error}


def take_first(cells: dict[str, str]) -> str:
    """Remove the first cell; its name."""
    name = next(iter(cells))
    del cells[name]
    return name


def start(
    bench: Bench, kind: str, processes: int, results: Path, cells: Sequence[str] | Any
) -> subprocess.Popen[str]:
    """A group of processes at work on cells."""
    script = str(Path(__file__).with_name("engine_cells.py"))
    torchrun = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    return subprocess.Popen(
        [sys.executable, *(torchrun if processes > 1 else []), script, kind, str(results), *cells],
        env=environment(bench),
        stdout=subprocess.DEVNULL,
        stderr=(bench.folder / "stderr.txt").open("w"),
        text=True,
        start_new_session=True,
    )


def environment(bench: Bench) -> dict[str, str]:
    """Of all processes; NVLink multicast stays as the machine has it."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")])
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if bench.tiny else {}
    threads = "1" if bench.tiny else "8"
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": threads, **hidden}


def watch(bench: Bench, process: subprocess.Popen[str], results: Path, seconds: float) -> str:
    """Wait for a group; why it did not do all of its cells, or nothing."""
    seen, since = 0, time.monotonic()
    while process.poll() is None:
        count = len(read_lines(results))
        if count > seen:
            seen, since = count, time.monotonic()
        if time.monotonic() - since > bench.limit(seconds):
            end_tree(process)
            return f"took longer than {time.monotonic() - since:.0f} s"
        time.sleep(0.5)
    if process.returncode == 0:
        return ""
    return last_words(bench)


def last_words(bench: Bench) -> str:
    """The lines of stderr that name an error, else its end."""
    lines = (bench.folder / "stderr.txt").read_text(errors="replace").splitlines()
    named = [line for line in lines if "Error" in line and "ChildFailedError" not in line]
    return " | ".join((named or lines)[:4])[-1500:]


def end_tree(process: subprocess.Popen[str]) -> None:
    """Kill a process and all below it: torchrun's workers sit in sessions of their own."""
    for pid in descendants(process.pid):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue  # ended with its parent
    process.wait()


def descendants(pid: int) -> list[int]:
    """A process and all below it."""
    found = [pid]
    for parent in found:
        for file in Path(f"/proc/{parent}/task").glob("*/children"):
            found += [int(child) for child in file.read_text().split()]
    return found


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSONL file that may be growing."""
    if not file.is_file():
        return []
    return [json.loads(line) for line in file.read_text().split("\n")[:-1]]


def differences(cell: dict[str, Any], alone: dict[str, Any] | None) -> dict[str, Any]:
    """A cell with how far its losses are from those of one GPU."""
    if alone is None or "losses" not in cell or "losses" not in alone:
        return cell
    pairs = zip(cell["losses"], alone["losses"], strict=False)
    return cell | {"furthest_from_one_gpu": max(abs(x - y) for x, y in pairs)}


def losses(bench: Bench) -> None:
    """LoRA and full under each engine on several GPUs, against one GPU and the same batches."""
    methods = ("lora", "full")
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


def apart(bench: Bench) -> None:
    """Fifty steps in which a process often has text alone, and six in which one always has."""
    cells = {}
    for engine in ("zero3", "fsdp2", "ddp"):
        name = f"full-{engine}-shares"
        steps = {"max_steps": 50, "gradient_accumulation_steps": 1}
        cells[name] = str(recipe(bench, name, "full", ENGINES[engine], **steps))
        name = f"lora-{engine}-apart"
        steps = {"train_sampling_strategy": "sequential", "data": "ordered.json"}
        steps |= {"gradient_accumulation_steps": 1}
        cells[name] = str(recipe(bench, name, "lora", ENGINES[engine], **steps))
    for cell in group(bench, "train", bench.gpus, cells, 120):
        if "losses" in cell:
            cell["losses"] = [cell["losses"][0], cell["losses"][-1]]
        bench.log(cell)


def kill(bench: Bench) -> None:
    """`vltrain --gpus N`: one process is killed, the rest stop, the same command goes on, merge."""
    settings = {"max_steps": KILLED_STEPS, "gradient_accumulation_steps": 1}
    settings |= {"save_strategy": "steps", "save_steps": 4, "save_total_limit": 1}
    whole = recipe(bench, "whole", "lora", ENGINES["ddp"], **settings)
    for cell in group(bench, "train", bench.gpus, {"whole": str(whole)}, 120):
        bench.log(cell)
    cut = recipe(bench, "cut", "lora", ENGINES["ddp"], **settings)
    words = ["lora", str(cut)]
    command = [sys.executable, "-m", "vltrain", *words, "--gpus", str(bench.gpus)]
    if bench.tiny:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m"]
        command += ["vltrain", *words]
    bench.log({"cell": "kill", **kill_one(bench, command)})
    resumed = subprocess.run(
        command, env=environment(bench), capture_output=True, text=True, timeout=bench.limit(150)
    )
    rows = [read_lines(bench.folder / "runs" / name / "metrics.jsonl") for name in ("whole", "cut")]
    pairs = [(x["loss"], y["loss"]) for x, y in zip(*rows, strict=False)]
    bench.log(
        {
            "cell": "resume",
            "exit_code": resumed.returncode,
            "resumed_from": [x for x in resumed.stdout.splitlines() if "resuming" in x],
            "steps": len(rows[1]),
            "furthest_from_uninterrupted": max((abs(x - y) for x, y in pairs), default=None),
            "error": resumed.stderr[-500:] if resumed.returncode else "",
        }
    )
    merge(bench)


def kill_one(bench: Bench, command: Sequence[str]) -> dict[str, Any]:
    """Kill process 1 of a run after its 6th step; how the others end."""
    log = (bench.folder / "stderr.txt").open("w")
    process = subprocess.Popen(
        command, env=environment(bench), stdout=subprocess.DEVNULL, stderr=log, text=True
    )
    metrics = bench.folder / "runs" / "cut" / "metrics.jsonl"
    until = time.monotonic() + bench.limit(120)
    while process.poll() is None and len(read_lines(metrics)) < 6 and time.monotonic() < until:
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


def merge(bench: Bench) -> None:
    """Merge what the resumed run has made."""
    words = ["merge", str(bench.folder / "runs/cut/final"), str(bench.folder / "merged")]
    started = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, "-m", "vltrain", *words],
            env=environment(bench),
            capture_output=True,
            text=True,
            timeout=bench.limit(120),
        )
    except subprocess.TimeoutExpired:
        bench.log({"cell": "merge", "error": "took too long"})
        return
    said = (done.stdout + done.stderr).strip().splitlines()[-1:]
    seconds = time.monotonic() - started
    bench.log({"cell": "merge", "exit_code": done.returncode, "said": said, "seconds": seconds})


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
    parser.add_argument("--tiny", action="store_true", help="a toy model on CPUs")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="engines-"))
    deadline = time.monotonic() + options.minutes * 60
    bench = Bench(folder, options.results.resolve(), options.tiny, options.gpus, deadline)
    bench.log(versions(bench.gpus))
    write_base(bench)
    parts = {
        "losses": lambda: losses(bench),
        "apart": lambda: apart(bench),
        "kill": lambda: kill(bench),
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
