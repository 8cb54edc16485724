"""Where the time of a training step goes: each part of it by itself, and a layer's kernels.

    python benchmarks/layer_time.py --output layer_time.jsonl

One decoder layer of Qwen-VL's real widths with random weights, on packed rows of samples of 2,048
tokens, forwards and backwards: without adapters, with them, with their dropout, by how it is run.
Beside it a layer of the frozen ViT on 8 pictures, the head with its loss on the learned tokens of
8 samples, and an update of all adapters. Medians of runs behind ones that are not counted, each
by the clock until the GPU is done; `--trace` adds the kernels that take longest: of a compiled
layer of either kind, and of the head.
`--tiny` runs all of it with small widths, on a CPU too, where its times mean nothing.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from step_speed import SMALL, STEP_SAMPLES
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from vltrain.config import FreezeConfig
from vltrain.models.adapters import Adapter, add_lora
from vltrain.models.attention import attend_packed
from vltrain.models.catalog import QWEN_VL
from vltrain.models.layer_runs import LayerRuns, arrange_layers
from vltrain.models.loss import learned_loss
from vltrain.models.qwen_vl import QwenVLConfig, QwenVLForConditionalGeneration
from vltrain.models.qwen_vl.positions import rotary_tables

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
COMPILED = LayerRuns(compiled=True)
LONGEST = 2048  # tokens of a sample


@dataclass(frozen=True)
class Part:
    """One measurement of a decoder layer."""

    name: str
    adapters: bool = True
    dropout: float = 0.05
    runs: LayerRuns = COMPILED


PARTS = (
    Part("as it is", runs=LayerRuns()),
    Part("compiled"),
    Part("compiled, no dropout", dropout=0.0),
    Part("compiled, no adapters", adapters=False),
    *(Part(f"compiled, {s:.0%} kept", runs=LayerRuns(True, 0, s)) for s in (0.7, 0.5, 0.0)),
    Part("compiled, recomputed", runs=LayerRuns(True, 1)),
)


def one_layer(config: QwenVLConfig, part: Part) -> nn.Module:
    """A model of one decoder layer, arranged as the part says, that learns in its adapters."""
    torch._dynamo.reset()
    torch.set_default_dtype(DTYPE)
    with DEVICE:
        base = QwenVLForConditionalGeneration(config)
    torch.set_default_dtype(torch.float32)
    attend_packed(base)
    adapter = Adapter(dropout=part.dropout)
    model = add_lora(base, QWEN_VL, FreezeConfig(), adapter, seed=0) if part.adapters else base
    if not part.adapters:
        base.requires_grad_(requires_grad=False)
    arrange_layers(model, part.runs)
    return base.train()


def layer_run(config: QwenVLConfig, model: nn.Module, samples: int) -> Callable[[], None]:
    """Forwards and backwards through the decoder layer, on so many samples in a row."""
    layer = model.transformer.h[0]
    tokens = samples * LONGEST
    shape = (1, tokens, config.hidden_size)
    hidden = torch.randn(shape, device=DEVICE, dtype=DTYPE, requires_grad=True)
    gradient = torch.randn(shape, device=DEVICE, dtype=DTYPE)
    positions = torch.arange(LONGEST, device=DEVICE).repeat(samples)[None]
    rotary = rotary_tables(positions, torch.ones(1, device=DEVICE), config)
    ends = torch.arange(0, tokens + 1, LONGEST, dtype=torch.int32, device=DEVICE)
    where = {"cu_seq_lens_q": ends, "max_length_q": LONGEST}
    mask = torch.empty(0, dtype=torch.bool, device=DEVICE) if ON_GPU else None

    def run() -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=ON_GPU):
            out = layer(hidden, mask, rotary, None, **(where if ON_GPU else {}))
        out.backward(gradient)

    return run


def vision_run(model: nn.Module) -> Callable[[], None]:
    """Forwards through a frozen layer of the ViT, on the pictures of a step."""
    arrange_layers(model, COMPILED)
    blocks = [m for m in model.transformer.visual.modules() if _is_layer(m)]
    vision = model.config.vision
    patches = (vision.image_size // vision.patch_size) ** 2
    seen = torch.randn(STEP_SAMPLES, patches, vision.width, device=DEVICE, dtype=DTYPE)

    def run() -> None:
        with torch.no_grad(), torch.autocast(DEVICE.type, torch.bfloat16, enabled=ON_GPU):
            blocks[0](seen)

    return run


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, GradientCheckpointingLayer)


def head_run(config: QwenVLConfig, model: nn.Module, learned: int) -> Callable[[], None]:
    """The head and the loss of so many learned tokens, forwards and backwards."""
    shape = (1, learned + 1, config.hidden_size)
    hidden = torch.randn(shape, device=DEVICE, dtype=DTYPE, requires_grad=True)
    labels = torch.randint(0, config.vocab_size, (1, learned + 1), device=DEVICE)
    places = torch.arange(learned, device=DEVICE)

    def run() -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=ON_GPU):
            learned_loss(hidden, model.lm_head, labels, learned, places).backward()

    return run


def update_run(model: nn.Module, layers: int) -> Callable[[], None]:
    """An update of the adapters of so many layers."""
    sizes = [p.shape for p in model.parameters() if p.requires_grad] * layers
    weights = [torch.zeros(size, device=DEVICE) for size in sizes]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    return torch.optim.AdamW(weights, fused=True).step


def seconds_of(run: Callable[[], Any], count: int) -> dict[str, float]:
    """The median of so many runs, and what the first one took."""
    taken = []
    for _ in range(count + 3):
        _synchronize()
        began = time.perf_counter()
        run()
        _synchronize()
        taken.append(time.perf_counter() - began)
    return {"seconds": statistics.median(taken[3:]), "first_seconds": taken[0]}


def _synchronize() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def peak_bytes(run: Callable[[], Any]) -> int | None:
    """What the GPU holds at most while it runs, beyond what it held before."""
    if not ON_GPU:
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before


def kernels(run: Callable[[], Any], count: int = 60) -> list[dict[str, Any]]:
    """The kernels of one run that take longest: name, calls, milliseconds."""
    activities = [torch.profiler.ProfilerActivity.CUDA if ON_GPU else None]
    with torch.profiler.profile(activities=[a for a in activities if a] or None) as profile:
        run()
        _synchronize()
    rows = sorted(profile.key_averages(), key=lambda row: -row.self_device_time_total)
    return [
        {"name": row.key[:90], "calls": row.count, "ms": row.self_device_time_total / 1e3}
        for row in rows[:count]
    ]


def measured(config: QwenVLConfig, options: argparse.Namespace) -> list[dict[str, Any]]:
    """All parts, a line each."""
    lines = []

    def note(name: str, run: Callable[[], Any], *, trace: bool = False) -> None:
        line = {"part": name, **seconds_of(run, options.count), "peak_bytes": peak_bytes(run)}
        if trace:
            line["kernels"] = kernels(run)
        lines.append(line)
        print(json.dumps(line), flush=True)

    for part in PARTS:
        if options.only and part.name not in options.only:
            continue
        model = one_layer(config, part)
        trace = options.trace and part.name == "compiled"
        note(part.name, layer_run(config, model, options.samples), trace=trace)
    if options.only:
        return lines
    model = one_layer(config, Part("compiled"))
    note("update of all adapters", update_run(model, 32))
    note("layer of the ViT", vision_run(model), trace=options.trace)
    learned = STEP_SAMPLES * (LONGEST - config.vision.n_queries - 2)
    head = head_run(config, model, learned if ON_GPU else 64)
    note("head and loss", head, trace=options.trace)
    return lines


def main() -> None:
    """Measure, and write one JSON object a line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, help="a file for the lines, beside stdout")
    parser.add_argument("--samples", type=int, default=4, help="of 2,048 tokens in a row")
    parser.add_argument("--count", type=int, default=20, help="of runs that are measured")
    parser.add_argument("--only", nargs="+", help="parts of these names, and nothing else")
    parser.add_argument("--trace", action="store_true", help="name a layer's kernels")
    parser.add_argument("--tiny", action="store_true", help="small widths, on a CPU too")
    options = parser.parse_args()
    sizes = SMALL | {"num_hidden_layers": 1} if options.tiny else {"num_hidden_layers": 1}
    config = QwenVLConfig(**sizes)
    config.use_cache = False
    machine = {
        "device": torch.cuda.get_device_name() if ON_GPU else "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    lines = measured(config, options)
    if options.output is not None:
        text = "".join(json.dumps(line | machine) + "\n" for line in lines)
        options.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
