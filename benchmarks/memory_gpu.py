"""Peak memory and seconds a step of Q-LoRA and of full training at Qwen-VL's real size.

    python benchmarks/memory_gpu.py --output memory.jsonl

A checkpoint with random weights is written first, in the published layout and bfloat16 (19 GB), and
each cell reads it as a run does, in a process of its own. The work is the original's: batch 1 x
accumulation 8, gradient checkpointing, one picture a sample, rank 64. Each cell is one JSON object
in the output as soon as it is done, or why it failed. `--tiny` runs all on a small model on a CPU.

`peak_gib` is what torch had allocated at most while it trained, `reserved_gib` what its allocator
held, `device_gib` what the device had lost when training ended: paged optimizer states and the
CUDA context are in this one alone. `host_growth_gib` is anonymous memory, so mapped files do not
count.
"""

import argparse
import dataclasses
import gc
import json
import re
import statistics
import tempfile
import threading
import time
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from json_lines import tell
from real_size_lora import TOY, Samples, StepClock, step_arguments
from transformers import PreTrainedModel, PrinterCallback

from vltrain.config import FreezeConfig
from vltrain.data.collation import Collator
from vltrain.models.adapters import Adapter, add_lora, set_learned
from vltrain.models.catalog import QWEN_VL
from vltrain.models.loading import load_model
from vltrain.models.quantization import Nf4
from vltrain.models.qwen_vl import QwenVLConfig, QwenVLForConditionalGeneration
from vltrain.models.saving import save_like
from vltrain.training.trainer import Trainer

WARMUP_STEPS = 1  # run before the measured ones: allocator and kernels settle
GIB = 2**30

Method = Literal["nf4", "nf4-vision", "lora", "residual", "stochastic"]


@dataclass(frozen=True)
class Cell:
    """One run to measure."""

    method: Method
    tokens: int
    steps: int = 3
    accumulation: int = 8
    limit_gib: float | None = None  # of memory that the allocator may reserve
    seconds: float = 75  # after which it is given up


CELLS = (
    Cell("nf4-vision", 2048),
    Cell("nf4", 2048),
    Cell("nf4-vision", 384),
    Cell("residual", 2048, seconds=110),
    Cell("nf4-vision", 2048, limit_gib=10.8),
    Cell("stochastic", 2048, seconds=110),
    Cell("nf4", 384),
    Cell("lora", 2048),
)
"""In the order of what is wanted most: the whole may run out of time."""


class HostMemory(threading.Thread):
    """The most anonymous memory that this process has had since it was started."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.start_bytes = self.peak_bytes = anonymous_bytes()
        self.done = threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.02):
            self.peak_bytes = max(self.peak_bytes, anonymous_bytes())

    def growth_gib(self) -> float:
        """Stop looking; how far the peak lay over the start."""
        self.done.set()
        self.join()
        return (self.peak_bytes - self.start_bytes) / GIB


def anonymous_bytes() -> int:
    """Memory of this process that belongs to no file."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) * 1024


def model_config(tiny: bool) -> QwenVLConfig:
    """The published sizes, or small ones."""
    return QwenVLConfig(**(TOY if tiny else {}))


def write_checkpoint(folder: Path, tiny: bool) -> dict[str, Any]:
    """Random weights in the published layout; how long it took."""
    started = time.perf_counter()
    base = folder.with_name("layout")
    base.mkdir(parents=True)
    folder.mkdir()
    config = model_config(tiny).to_dict() | {"model_type": "qwen", "torch_dtype": "bfloat16"}
    (base / "config.json").write_text(json.dumps(config, default=str))
    with torch.device("meta"):
        shapes = QwenVLForConditionalGeneration(model_config(tiny)).state_dict()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensors = {}
    for name, tensor in shapes.items():
        random = torch.randn(tensor.shape, device=device, dtype=torch.bfloat16) * 0.02
        tensors[name] = (random + 1 if "ln_" in name and "weight" in name else random).cpu()
    save_like(base, tensors, folder)
    if device == "cuda":
        torch.cuda.empty_cache()  # or the cells would find less of the device
    seconds = time.perf_counter() - started
    return {"cell": "checkpoint", "seconds": seconds, "files": len(list(folder.iterdir()))}


def prepare(cell: Cell, folder: Path) -> PreTrainedModel:
    """The model of a cell, read and ready to learn."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    quantize = Nf4(vision=cell.method == "nf4-vision") if "nf4" in cell.method else None
    model = load_model(folder, dtype="bf16", device=device, quantize=quantize)
    model.config.use_cache = False
    if cell.method in ("residual", "stochastic"):
        return set_learned(model, QWEN_VL, FreezeConfig())
    return add_lora(model, QWEN_VL, FreezeConfig(), Adapter(), seed=0)


def trainer_of(cell: Cell, model: PreTrainedModel, config: QwenVLConfig, clock: StepClock) -> Any:
    """A Trainer with the cell's optimizer, over random samples."""
    full = cell.method in ("residual", "stochastic")
    arguments = step_arguments(
        WARMUP_STEPS + cell.steps,
        cell.accumulation,
        learning_rate=1e-5 if full else 1e-4,
        optim="adamw_torch" if cell.method == "lora" or full else "paged_adamw_8bit",
        bf16=True,
        dataloader_num_workers=2 if torch.cuda.is_available() else 0,
    )
    optimizer = None
    if full:
        from vltrain.training.bf16_adamw import Bf16AdamW

        optimizer = (Bf16AdamW, {"lr": 1e-5, "betas": (0.9, 0.95), "rounding": cell.method})
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=Samples(config, cell.tokens, cell.accumulation * arguments.max_steps),
        data_collator=Collator(pad_id=151643),
        callbacks=[clock],
        optimizer_cls_and_kwargs=optimizer,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def gpu_memory() -> dict[str, float]:
    """Peaks since the last reset, and what the device has lost by now."""
    if not torch.cuda.is_available():
        return {}
    free, total = torch.cuda.mem_get_info()
    return {
        "peak_gib": torch.cuda.max_memory_allocated() / GIB,
        "reserved_gib": torch.cuda.max_memory_reserved() / GIB,
        "device_gib": (total - free) / GIB,
    }


def measure(cell: Cell, folder: Path, tiny: bool, answer: Connection) -> None:
    """Read, train, and send what was measured."""
    import bitsandbytes  # noqa: F401 (so that its import counts for none of the memory below)

    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.init()
        torch.empty(1, device="cuda")
        if cell.limit_gib:
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(cell.limit_gib * GIB / total)
    host = HostMemory()
    host.start()
    started = time.perf_counter()
    model = prepare(cell, folder)
    reading = {"host_growth_gib": host.growth_gib(), "seconds": time.perf_counter() - started}
    reading |= gpu_memory()
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()  # what was read in 16 bits has left pieces behind
        torch.cuda.reset_peak_memory_stats()
    clock = StepClock()
    trainer = trainer_of(cell, model, model_config(tiny), clock)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    answer.send(
        {
            "reading": reading,
            **gpu_memory(),
            "seconds_per_step": statistics.median(clock.seconds[WARMUP_STEPS:]),
            "all_seconds": clock.seconds,
            "losses": losses,
        }
    )


def run_cell(cell: Cell, folder: Path, tiny: bool, seconds: float) -> dict[str, Any]:
    """What a cell measured, or why it did not, after `seconds` at most."""
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(cell, folder, tiny, sender))
    process.start()
    sender.close()
    try:
        found = receiver.recv() if receiver.poll(seconds) else {"failed": f"no end in {seconds} s"}
    except EOFError:
        process.join()
        found = {"failed": f"the process ended with {process.exitcode}; see stderr"}
    process.kill()
    process.join()
    return dataclasses.asdict(cell) | found


def main() -> None:
    """Measure each cell while there is time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--folder", type=Path, help="where the checkpoint is to lie")
    parser.add_argument("--methods", nargs="+", help="only cells of these")
    parser.add_argument("--seconds", type=float, default=460, help="for all cells together")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    folder = (options.folder or Path(tempfile.mkdtemp())) / "checkpoint"

    def write(row: dict[str, Any]) -> None:
        row |= {"torch": torch.__version__, "transformers": transformers.__version__}
        row["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        tell(row, options.output)

    write(write_checkpoint(folder, options.tiny))
    for cell in CELLS:
        if options.methods and cell.method not in options.methods:
            continue
        if options.tiny:
            cell = dataclasses.replace(cell, tokens=300, steps=1, accumulation=1, seconds=300)
        left = deadline - time.monotonic()
        if left < cell.seconds / 2:
            write(dataclasses.asdict(cell) | {"failed": "no time left"})
            continue
        write(run_cell(cell, folder, options.tiny, min(left, cell.seconds)))


if __name__ == "__main__":
    main()
