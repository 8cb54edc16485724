"""`vltrain estimate` beside what torch really allocates, on a Qwen-VL of the real size.

    python benchmarks/estimate_gpu.py

Random weights, one picture a sample, batch 1, gradient checkpointing; three steps of two
micro-batches each, so that gradients and the optimizer's states are there at the peak. Full
training is of 8 of the 32 layers, which fit one GPU; Q-LoRA's NF4 is made of the random weights
when they are on the GPU, and needs bitsandbytes. Each cell runs in a process of its own and
is printed as a JSON line. `--toy` runs the same on a small model, on a CPU, where nothing but the
estimate can be printed.
"""

import argparse
import json
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import transformers
from real_size_lora import TOY, Samples
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from vltrain.config import Recipe, load_recipe
from vltrain.data.collation import Collator
from vltrain.models.catalog import QWEN_VL
from vltrain.models.hub import ResolvedModel
from vltrain.models.qwen_vl import QwenVLConfig
from vltrain.training.arguments import training_arguments
from vltrain.training.engines import NO_ENGINE
from vltrain.training.memory import GIB
from vltrain.training.profiling import measure
from vltrain.workflows.base import Base, memory_of
from vltrain.workflows.estimate import random_model

STEPS, ACCUMULATION = 3, 2
FULL_LAYERS = 8

CELLS: dict[str, tuple[str, ...]] = {
    "lora": ("lora.embeddings=false",),
    "full": ("full.weights=fp32",),
    "qlora": ("trainer.optim=paged_adamw_8bit",),
    "qlora_vision": ("trainer.optim=paged_adamw_8bit", "quantize.vision=true"),
    "lora_adamw_torch": ("lora.embeddings=false", "trainer.optim=adamw_torch"),
    "lora_embeddings": ("lora.embeddings=true",),
    "lora_no_checkpointing": ("lora.embeddings=false", "trainer.gradient_checkpointing=false"),
}
"""Recipes that are measured, by name: the keys that are set beside the defaults."""


class Phases:
    """The highest allocation in the forwards, the backwards and the steps of a run. Bytes."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.peaks = dict.fromkeys(("forward", "backward", "step"), 0)
        self.now = "forward"
        model.register_forward_pre_hook(lambda *_: self.enter("forward"))
        model.register_forward_hook(lambda *_: self.enter("backward"))
        register_optimizer_step_pre_hook(lambda *_: self.enter("step"))
        register_optimizer_step_post_hook(lambda *_: self.enter("forward"))

    def enter(self, phase: str) -> None:
        """Write the phase that ends down, and begin another."""
        self.peaks[self.now] = max(self.peaks[self.now], torch.cuda.max_memory_allocated())
        torch.cuda.reset_peak_memory_stats()
        self.now = phase


def recipe_of(cell: str, tokens: int, folder: Path) -> Recipe:
    """The recipe of a cell: the method's defaults, a few steps that leave nothing behind."""
    settings = (
        f"data.max_length={tokens}",
        f"trainer.max_steps={STEPS}",
        f"trainer.gradient_accumulation_steps={ACCUMULATION}",
        "trainer.save_strategy='no'",
        "trainer.logging_strategy='no'",
        "trainer.report_to=none",
        *("compile=false", "memory=null", "data.packing=false"),
    )
    return load_recipe(
        None,
        method=cell.partition("_")[0],
        model="random weights",
        data=(Path("random"),),
        output=folder,
        overrides=(*settings, *CELLS[cell]),
    )


def run_cell(cell: str, tokens: int, *, toy: bool) -> dict[str, Any]:
    """One cell: what was estimated and, on a GPU, what was measured. Sizes in GiB."""
    started = time.perf_counter()
    config = QwenVLConfig(**(TOY if toy else {}))
    if cell.startswith("full") and not toy:
        config.num_hidden_layers = FULL_LAYERS
    base = Base(ResolvedModel(Path(), None, "random weights"), QWEN_VL, config, processor=None)
    with tempfile.TemporaryDirectory() as folder:
        recipe = recipe_of(cell, tokens, Path(folder))
        arguments = training_arguments(recipe)
        _, run = memory_of(recipe, base, arguments, NO_ENGINE, None, gpu_bytes=None)
        estimated = run.estimate
        model = random_model(recipe, base, seed=0)
        samples = Samples(config, tokens, STEPS * ACCUMULATION)
        held = torch.cuda.memory_allocated() if torch.cuda.is_available() else None
        phases = Phases(model) if held is not None else None
        measured = measure(model, arguments, samples, Collator(pad_id=151643))
    row: dict[str, Any] = {
        "cell": cell,
        "tokens": tokens,
        "layers": config.num_hidden_layers,
        "estimated": round(estimated.total / GIB, 3),
        "estimated_weights": round(sum(estimated.weights.values()) / GIB, 3),
        "estimated_peak_in": estimated.peak.name,
        "moments": {m.name: round(m.total / GIB, 3) for m in estimated.moments},
        "seconds_per_step": [round(second, 2) for second in measured.seconds],
    }
    if phases is not None and held is not None:
        phases.enter("forward")
        row |= measured_row(phases, held, measured.reserved_bytes, measured.context_bytes)
        row["error"] = round(row["estimated"] / row["measured"] - 1, 4)
    return row | {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "seconds": round(time.perf_counter() - started, 1),
    }


def measured_row(
    phases: Phases, held: int, reserved: int | None, context: int | None
) -> dict[str, Any]:
    """What was measured, in GiB: the peak, and what it is made of."""
    return {
        "measured": round(max(phases.peaks.values()) / GIB, 3),
        "measured_weights": round(held / GIB, 3),
        "phases": {name: round(peak / GIB, 3) for name, peak in phases.peaks.items()},
        "reserved": round((reserved or 0) / GIB, 3),
        "context": round((context or 0) / GIB, 3),
    }


def main() -> None:
    """Measure each cell at each length; one that fails is printed with its error."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", nargs="+", choices=list(CELLS), default=list(CELLS))
    parser.add_argument("--tokens", type=int, nargs="+", default=[384, 1024, 2048])
    parser.add_argument("--toy", action="store_true")
    options = parser.parse_args()
    for cell in options.cells:
        for tokens in options.tokens:
            # In a process of its own, or the peak would count what the cell before has left.
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                try:
                    row = process.submit(run_cell, cell, tokens, toy=options.toy).result()
                except (RuntimeError, ValueError, BrokenProcessPool) as error:
                    row = {"cell": cell, "tokens": tokens, "failed": f"{error}"[:500]}
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
