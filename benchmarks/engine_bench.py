"""Where the cells of `engines_gpu.py` run: folder, base, data and recipes, and the processes."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from json_lines import tell

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
CELL_SECONDS = 120  # that a run of a recipe may take, the start included
# Of the decoder and of the ViT, where whole checkpoints are written again and again.
SMALL_LAYERS = 2


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
        tell(cell, self.results)

    def limit(self, seconds: float) -> float:
        """Seconds that a cell may take: no more than are left."""
        return max(1.0, min(seconds, self.deadline - time.monotonic()))


def write_bases(bench: Bench) -> None:
    """The models, and records of which every second one, in random order, has a picture."""
    import tiny
    import torch
    from PIL import Image

    for name, layers in (("base", WIDE["num_hidden_layers"]), ("small", SMALL_LAYERS)):
        config = dict(tiny.QWEN_VL_CONFIG)
        if not bench.tiny:
            config |= WIDE | {"torch_dtype": "bfloat16", "num_hidden_layers": layers}
            config["visual"] = config["visual"] | WIDE_VISION | {"layers": layers}
        with torch.device("cpu" if bench.tiny else "cuda"):
            tiny.write_qwen_vl(bench.folder / name, config=config)
    if not bench.tiny:
        torch.cuda.empty_cache()
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
    base = bench.folder / trainer.pop("base", "base")
    values: dict[str, Any] = {
        "method": method,
        "model": str(base),
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


def run_cell(
    bench: Bench, kind: str, processes: int, name: str, what: str, seconds: float
) -> dict[str, Any]:
    """One cell in processes of its own, so that its peaks of memory are its own too.

    Args:
        kind: of cell, as `engine_cells.py` knows them.
        processes: of the group; one runs by itself.
        name: of the cell.
        what: stands for it on the command line.
        seconds: that it may take, the start included.
    """
    if bench.limit(1e9) <= 5:
        return {"cell": name, "error": "no time was left"}
    own = bench.folder / "cell.jsonl"
    own.unlink(missing_ok=True)
    error = watch(bench, start(bench, kind, processes, own, what), seconds)
    found = read_lines(own)
    return found[0] if found else {"cell": name, "error": error or "it left no result"}


def start(
    bench: Bench, kind: str, processes: int, results: Path, what: str
) -> subprocess.Popen[str]:
    """A group of processes at work on one cell."""
    script = str(Path(__file__).with_name("engine_cells.py"))
    torchrun = ["-m", "torch.distributed.run", "--standalone"]
    torchrun.append(f"--nproc-per-node={processes}")
    return subprocess.Popen(
        [sys.executable, *(torchrun if processes > 1 else []), script, kind, str(results), what],
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


def watch(bench: Bench, process: subprocess.Popen[str], seconds: float) -> str:
    """Wait for a cell; why it did not come to its end, or nothing."""
    began, limit = time.monotonic(), bench.limit(seconds)
    while process.poll() is None:
        if time.monotonic() - began > limit:
            end_tree(process)
            return f"took longer than {limit:.0f} s"
        time.sleep(0.5)
    return last_words(bench) if process.returncode else ""


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
