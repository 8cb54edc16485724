"""Seconds a step and peak memory of LoRA on a Qwen-VL of the real size, random weights.

    python benchmarks/real_size_lora.py --tokens 2048 --steps 5

The work is the original's: batch 1 x accumulation 8, gradient checkpointing, one picture a sample,
rank 64 on c_attn, attn.c_proj, w1 and w2. `--toy` runs the same on a small model, on a CPU.
"""

import argparse
import json
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch
import transformers
from rich.console import Console
from transformers import PrinterCallback, TrainingArguments

from vltrain.config import FreezeConfig
from vltrain.data.collation import Collator
from vltrain.models.adapters import Adapter, add_lora
from vltrain.models.catalog import QWEN_VL
from vltrain.models.qwen_vl import QwenVLConfig, QwenVLForConditionalGeneration
from vltrain.training.callbacks import ProgressBar
from vltrain.training.profiling import StepClock
from vltrain.training.trainer import Trainer

ACCUMULATION = 8
WARMUP_STEPS = 2  # run before the measured ones: allocator and kernels settle

TOY = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "kv_channels": 64,
    "visual": {
        "image_size": 448,
        "patch_size": 14,
        "width": 64,
        "layers": 2,
        "heads": 4,
        "mlp_ratio": 4.9231,
        "output_dim": 256,
        "image_start_id": 151857,
    },
}


class Samples(torch.utils.data.Dataset):
    """Samples of random text behind one random picture, every text token learned."""

    def __init__(self, config: QwenVLConfig, tokens: int, count: int) -> None:
        self.config, self.tokens, self.count = config, tokens, count
        self.lengths = np.full(count, tokens)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        vision = self.config.vision
        generator = torch.Generator().manual_seed(index)
        pads = [vision.image_pad_id] * vision.n_queries
        picture = [vision.image_start_id, *pads, vision.image_end_id]
        text = torch.randint(0, 151643, (self.tokens - len(picture),), generator=generator).tolist()
        side = vision.image_size
        return {
            "input_ids": picture + text,
            "labels": [-100] * len(picture) + text,
            "pixel_values": torch.randn(1, 3, side, side, generator=generator),
        }


def step_arguments(steps: int, accumulation: int, **others: Any) -> TrainingArguments:
    """Of steps that are measured and leave nothing behind; `others` are added or win.

    One process trains on one GPU, however many there are: transformers would spread its batches
    over all of them by nn.DataParallel.
    """
    on_gpu = torch.cuda.is_available()
    settings = {
        "output_dir": tempfile.mkdtemp(),
        "max_steps": steps,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": accumulation,
        "gradient_checkpointing": True,
        "learning_rate": 1e-4,
        "bf16": on_gpu,
        "use_cpu": not on_gpu,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # as in a run
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_num_workers": 4 if on_gpu else 0,
    }
    arguments = TrainingArguments(**settings | others)
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def measure(tokens: int, steps: int, *, toy: bool) -> dict[str, Any]:
    """Train and return what was measured, with the machine it was measured on."""
    on_gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if on_gpu else torch.float32
    config = QwenVLConfig(**(TOY if toy else {}))
    config._attn_implementation = "sdpa"
    torch.set_default_dtype(dtype)
    with torch.device("cuda" if on_gpu else "cpu"):
        base = QwenVLForConditionalGeneration(config)
    torch.set_default_dtype(torch.float32)
    base.config.use_cache = False
    model = add_lora(base, QWEN_VL, FreezeConfig(), Adapter(), seed=0)
    clock = StepClock()
    trainer = Trainer(
        model=model,
        args=step_arguments(WARMUP_STEPS + steps, ACCUMULATION),
        train_dataset=Samples(config, tokens, ACCUMULATION * (WARMUP_STEPS + steps)),
        data_collator=Collator(pad_id=151643),
        callbacks=[clock, ProgressBar(Console())],
    )
    trainer.remove_callback(PrinterCallback)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    return {
        "tokens": tokens,
        "seconds_per_step": statistics.median(clock.seconds[WARMUP_STEPS:]),
        "all_seconds": clock.seconds,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
        "parameters": base.num_parameters(),
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def main() -> None:
    """Measure each length and print one JSON object a line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--toy", action="store_true")
    options = parser.parse_args()
    for tokens in options.tokens:
        # In a process of its own, or the peak would count the model of the length before.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            measured = process.submit(measure, tokens, options.steps, toy=options.toy).result()
        print(json.dumps(measured), flush=True)


if __name__ == "__main__":
    main()
