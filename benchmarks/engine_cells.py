"""What the processes of `engines_gpu.py` do: runs of recipes, and steps at the real size.

    torchrun --nproc-per-node 2 benchmarks/engine_cells.py train RESULTS RECIPE
    torchrun --nproc-per-node 2 benchmarks/engine_cells.py speed RESULTS '{"engine": "ddp", …}'

A cell that ends well adds one JSON object to the file RESULTS.
"""

import gc
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from gpu_time import TracedStep
from peft import PeftModel
from real_size_lora import TOY, Samples, StepClock, step_arguments
from torch import distributed
from transformers import PrinterCallback, TrainerCallback, TrainerState

from vltrain.config import FreezeConfig, read_resolved
from vltrain.data.collation import Collator, collate_rows
from vltrain.data.step_rows import StepRows
from vltrain.models.adapters import Adapter, add_lora, learns_to_see, set_learned, widen_learned
from vltrain.models.attention import attend_packed
from vltrain.models.catalog import QWEN_VL
from vltrain.models.hub import ResolvedModel
from vltrain.models.layer_runs import LayerRuns
from vltrain.models.qwen_vl import QwenVLConfig, QwenVLForConditionalGeneration
from vltrain.training.engines import NO_ENGINE, Engine, engine_settings, read_deepspeed
from vltrain.training.flops import matmul_rate
from vltrain.training.processes import is_first, leave_group, process_count
from vltrain.training.run_dir import RunDir
from vltrain.training.trainer import Trainer
from vltrain.workflows.base import Base
from vltrain.workflows.profile import work_of_model
from vltrain.workflows.quiet import quiet_loggers
from vltrain.workflows.train import train

WARMUP_STEPS, COMPILING_STEPS = 1, 3  # before the measured ones; where layers are compiled
ROW_TOKENS = 8192  # of packed steps


def note(results: Path, cell: dict[str, Any]) -> None:
    """Add a cell to the results, once for all processes."""
    if is_first():
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(cell) + "\n")


def train_recipe(file: Path) -> dict[str, Any]:
    """A run of vltrain; its losses, and the most memory a GPU allocated."""
    started = time.perf_counter()
    recipe = read_resolved(file)
    train(recipe)
    rows = RunDir(recipe.output).read_metrics()
    environment = json.loads((recipe.output / "environment.json").read_text())
    return {
        "cell": recipe.output.name,
        "losses": [row["loss"] for row in rows if "loss" in row],
        "engine": environment["engine"],
        "zero_stage": environment["zero_stage"],
        "world_size": environment["world_size"],
        "peak_gib": peak_gib(),
        "seconds": time.perf_counter() - started,
    }


class StartPeak(TrainerCallback):
    """Keeps the peak of the start, where a whole model may lie on each GPU, from that of steps."""

    def __init__(self, warmup: int) -> None:
        """`warmup`: the steps of the start."""
        self.warmup = warmup
        self.gib: float | None = None

    def on_step_begin(self, _: Any, state: TrainerState, *__: Any, **___: Any) -> None:
        if state.global_step == self.warmup and torch.cuda.is_available():
            self.gib = torch.cuda.max_memory_allocated() / 2**30
            torch.cuda.reset_peak_memory_stats()


def measure_speed(wanted: dict[str, Any]) -> dict[str, Any]:
    """Steps of the real size with random weights: seconds, tokens a second and GPU, utilisation of
    what the device does in products of large matrices, memory.

    Args:
        wanted: `engine` ("none", "ddp", "fsdp2" or a name of ds_configs/), `method`, `tokens`,
            `steps`, `accumulation`, `toy`, `fast`: packed and compiled, `kept`: the share that
            such layers keep, `trace`: one more step, of which a trace is made.
    """
    on_gpu, fast = torch.cuda.is_available(), wanted["fast"]
    engine = engine_named(wanted["engine"])
    warmup = COMPILING_STEPS if fast else WARMUP_STEPS
    measured = warmup + wanted["steps"]
    steps = measured + wanted["trace"]
    arguments = step_arguments(
        steps,
        1 if fast else wanted["accumulation"],
        gradient_checkpointing=not fast,
        **engine_settings(engine, compiled=fast),
    )
    base_model = random_model(arguments.device, toy=wanted["toy"])
    config = base_model.config
    model = learning(base_model, wanted["method"], engine)
    base = Base(ResolvedModel(Path("random"), None, "random"), QWEN_VL, config, None)
    work = work_of_model(model, base)  # before the engine shares it out
    rate = matmul_rate(arguments.device, torch.bfloat16 if on_gpu else torch.float32)
    samples = Samples(config, wanted["tokens"], wanted["accumulation"] * process_count() * steps)
    feed = {"train_dataset": samples, "data_collator": Collator(pad_id=151643)}
    if fast:
        attend_packed(base_model)
        feed = packed_feed(samples, wanted, engine)
    clock, start, traced = StepClock(), StartPeak(warmup), TracedStep(measured)
    callbacks = [clock, start, traced]
    trainer = Trainer(model=model, args=arguments, callbacks=callbacks, engine=engine, **feed)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    seconds = statistics.median(clock.seconds[warmup:measured])
    flops = wanted["accumulation"] * work.step_flops(
        tokens=wanted["tokens"],
        learned=wanted["tokens"] - config.vision.n_queries - 2,
        pictures=1,
    )
    return {
        **wanted,
        "cell": f"speed-{wanted['method']}-{wanted['engine']}{'-fast' * fast}-x{process_count()}",
        "world_size": process_count(),
        "seconds_per_step": seconds,
        "tokens_per_second_and_gpu": wanted["tokens"] * wanted["accumulation"] / seconds,
        "flops_per_step_and_gpu": flops,
        "flops_per_second_of_products": rate,
        "utilisation": flops / seconds / rate,
        "all_seconds": clock.seconds[:measured],
        "traced": traced.found,
        "peak_gib": peak_gib(),
        "peak_gib_of_start": start.gib,
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
    }


def learning(
    model: QwenVLForConditionalGeneration, method: str, engine: Engine
) -> QwenVLForConditionalGeneration | PeftModel:
    """The model, ready to learn."""
    if method != "full":
        model = add_lora(model, QWEN_VL, FreezeConfig(), Adapter(), seed=0)
        assert not learns_to_see(model, QWEN_VL)
        return model
    set_learned(model, QWEN_VL, FreezeConfig())
    if engine.name != "deepspeed":  # which has float32 weights of its own
        widen_learned(model)
    return model


def packed_feed(samples: Samples, wanted: dict[str, Any], engine: Engine) -> dict[str, Any]:
    """What a Trainer is given to take the steps packed and compiled."""
    processes = process_count()
    rows = StepRows(
        samples,
        step_samples=wanted["accumulation"] * processes,
        row_tokens=ROW_TOKENS,
        processes=processes,
    )
    layers = LayerRuns(True, kept=wanted["kept"], gathered=engine.shards_weights)
    return {"train_dataset": rows, "data_collator": collate_rows, "layers": layers}


def engine_named(name: str) -> Engine:
    """The engine of a cell."""
    if name == "none":
        return NO_ENGINE
    if name in ("ddp", "fsdp2"):
        return Engine(name, "a cell asks for it", layers=QWEN_VL.layers)
    if not torch.cuda.is_available():  # as in a run, sums on CPUs are left to gloo
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return Engine("deepspeed", "a cell asks for it", read_deepspeed(name))


def random_model(device: torch.device, *, toy: bool) -> QwenVLForConditionalGeneration:
    """A Qwen-VL in bf16, made on its device; the same in every process."""
    config = QwenVLConfig(**(TOY if toy else {}))
    config._attn_implementation = "sdpa"
    config.use_cache = False
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if device.type == "cuda" else torch.float32)
    with device:
        model = QwenVLForConditionalGeneration(config)
    torch.set_default_dtype(torch.float32)
    return model


def peak_gib() -> float | None:
    """The most memory that a GPU has allocated since the last call, of all processes."""
    if not torch.cuda.is_available():
        return None
    peak = torch.tensor(torch.cuda.max_memory_allocated() / 2**30, device="cuda")
    if distributed.is_initialized():
        distributed.all_reduce(peak, distributed.ReduceOp.MAX)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return float(peak)


def main(kind: str, results: str, cell: str) -> None:
    quiet_loggers()
    made = train_recipe(Path(cell)) if kind == "train" else measure_speed(json.loads(cell))
    note(Path(results), made)
    leave_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
