"""What `after_gpu.py` measures: each part is a function that yields its rows."""

import argparse
import json
import random
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from generation_speed import Answers
from merge_memory import memory_of_imports, peak_of, write_adapter
from PIL import Image
from rich.console import Console
from torch import Tensor, nn

from vltrain.evaluation.compiled import reason_against
from vltrain.models.adapted import attach
from vltrain.models.catalog import QWEN_VL
from vltrain.models.gptq_solver import round_to_nearest
from vltrain.models.int4_kernels import Int4Linear, use_kernel
from vltrain.models.loading import load_model, load_processor
from vltrain.models.plain_weights import plain_weights
from vltrain.models.quantization import Nf4, dequantized_nf4
from vltrain.workflows.answering import load_for_answers
from vltrain.workflows.merge import plan_merge
from vltrain.workflows.proof import distance
from vltrain.workflows.quantize import Calibration, linear_layers, quantize, write_packed
from vltrain.workflows.reload import PROBES, probe_inputs, probe_logits

GIB = 2**30
ANSWERED = 16  # tokens, to see that a quantized folder answers

Row = dict[str, Any]
Send = Callable[[Row], None]


@dataclass(frozen=True)
class Work:
    """Where the inputs of all parts are."""

    folder: Path
    base: Path
    to_quantize: Path  # the base, or one with fewer layers
    adapter: Path  # of the base in NF4
    data: Path
    options: argparse.Namespace


def write_conversations(folder: Path, count: int) -> Path:
    """Conversations about pictures of noise and bars, in sentences of random words."""
    folder.mkdir()
    drawn = random.Random(0)
    words = ("red", "blue", "bar", "left", "right", "above", "below", "near", "two", "dots", "how")
    records = []
    for number in range(count):
        noise = Image.effect_noise((224, 168), 80).convert("RGB")
        bar = (drawn.randrange(256), drawn.randrange(256), drawn.randrange(256))
        noise.paste(bar, (drawn.randrange(100), 20, 120 + drawn.randrange(100), 120))
        noise.save(folder / f"{number}.png")
        asked, said = (" ".join(drawn.choices(words, k=length)) for length in (20, 60))
        turns = [
            {"from": "user", "value": f"Picture 1: <img>{number}.png</img>\n{asked}?"},
            {"from": "assistant", "value": f"{said}."},
        ]
        records.append({"id": str(number), "conversations": turns})
    file = folder / "conversations.json"
    file.write_text(json.dumps(records))
    return file


def device() -> str:
    """Where models are measured."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def settle() -> None:
    """Wait for the GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_gib() -> float | None:
    """What torch has had allocated at most since the last call; None on a CPU."""
    if not torch.cuda.is_available():
        return None
    torch.empty(1, device="cuda")  # before which there is no peak to reset
    peak = torch.cuda.max_memory_allocated() / GIB
    torch.cuda.reset_peak_memory_stats()
    return peak


class Stamped:
    """A file that a console writes to, and the time of each line."""

    def __init__(self, send: Send) -> None:
        self.began, self.send = time.perf_counter(), send
        self.layers: list[float] = []  # seconds at which each was done
        self.packing: float | None = None  # seconds at which the first was begun, or before it

    def write(self, text: str) -> int:
        """Pass on a line that tells of a layer."""
        for line in text.splitlines():
            now = time.perf_counter() - self.began
            if line.startswith("calibrating"):
                self.packing = now
            if line.startswith("layer "):
                self.layers.append(now)
                self.send({"part": "quantize", "line": line.strip(), "seconds": now})
        return len(text)

    def flush(self) -> None:
        """Nothing is held back."""


def quantize_part(work: Work, seconds: float, send: Send) -> Iterator[Row]:
    """`vltrain quantize`, and whether the folder that it wrote answers."""
    stamped = Stamped(send)
    out = work.folder / "quantized"
    peak_gib()
    data = Calibration((work.data,), samples=work.options.samples)
    quantize(str(work.to_quantize), out, data, Console(file=stamped, width=200))
    took = time.perf_counter() - stamped.began
    report = json.loads((out / "quantize.json").read_text())
    hidden = [layer["hidden"] for layer in report["layers"]]
    gains = [
        layer["linear"][name] / rounding
        for layer in report["layers"]
        for name, rounding in layer["rounding"].items()
        if rounding
    ]
    steps = [b - a for a, b in zip(stamped.layers, stamped.layers[1:], strict=False)]
    yield {
        "layers": len(hidden),
        "cut": work.to_quantize != work.base,
        "seconds": took,
        "seconds_before_packing": stamped.packing,
        "seconds_per_layer": statistics.median(steps) if steps else None,
        "data": report["data"],
        "error_behind_layer": [min(hidden), statistics.median(hidden), max(hidden)],
        "error_as_share_of_rounding": [min(gains), statistics.median(gains), max(gains)],
        "logits": report["logits"],
        "perplexity": report["perplexity"],
        "peak_gib": peak_gib(),
        "folder_gib": sum(file.stat().st_size for file in out.iterdir()) / GIB,
    }
    model, kernels, loading = load_int4(out)
    answers = Answers(model, work.options.context, ANSWERED, 1)
    took, said = answers.timed(ANSWERED, None)
    yield {"kernels": kernels, **loading, "answer_seconds": took, "answered": len(said)}


def write_rounded(base: Path, out: Path) -> Path:
    """A base with each weight of its decoder rounded by itself, in the layout that GPTQ has."""
    weights = plain_weights(base)
    linear = linear_layers(weights.model, QWEN_VL)
    tensors: dict[str, Tensor] = {}
    for name in weights.names():
        layer, _, own = name.rpartition(".")
        if layer not in linear:
            tensors[name] = weights.read(name)
        elif own == "weight":
            codes = round_to_nearest(weights.read(name).to(device()))
            has_bias = linear[layer].bias is not None
            bias = weights.read(f"{layer}.bias") if has_bias else torch.zeros(len(codes.codes))
            parts = codes.tensors(bias.to(weights.dtype))
            tensors |= {f"{layer}.{part}": tensor for part, tensor in parts.items()}
    out.mkdir()
    write_packed(base, tensors, out)
    return out


def load_int4(folder: Path, adapter: Path | None = None) -> tuple[nn.Module, int, Row]:
    """A model as `vltrain chat` loads it, its layers in the kernel, and what loading took.

    On a CPU, where `vltrain chat` leaves packed layers as they are, the kernel is put in too.
    """
    peak_gib()
    began = time.perf_counter()
    model, _ = load_for_answers(folder, adapter)
    if not torch.cuda.is_available():
        use_kernel(model)
    settle()
    loading: Row = {"load_seconds": time.perf_counter() - began, "load_peak_gib": peak_gib()}
    if torch.cuda.is_available():
        loading["weights_gib"] = torch.cuda.memory_allocated() / GIB
    return model, sum(isinstance(m, Int4Linear) for m in model.modules()), loading


def int4_part(work: Work, seconds: float, send: Send) -> Iterator[Row]:
    """Answers of a packed model, not compiled and compiled, alone and with an adapter on it."""
    began = time.perf_counter()
    folder = write_rounded(work.base, work.folder / "rounded")
    size = sum(file.stat().st_size for file in folder.iterdir()) / GIB
    made = {"weights": "rounded to nearest", "folder_gib": size}
    yield made | {"making_seconds": time.perf_counter() - began}
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    model, kernels, loading = load_int4(folder)
    options = work.options
    yield from answer_rows(
        Answers(model, options.context, options.new_tokens, 1),
        {"adapter": False, "kernels": kernels, "new_tokens": options.new_tokens} | loading,
    )
    del model
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    adapter = write_adapter(work.folder / "int4_adapter", folder, 0.02)
    model, kernels, loading = load_int4(folder, adapter)
    yield from answer_rows(
        Answers(model, options.context, options.adapter_tokens, 1),
        {"adapter": True, "kernels": kernels, "new_tokens": options.adapter_tokens} | loading,
    )


def answer_rows(answers: Answers, row: Row) -> Iterator[Row]:
    """One row for each way of decoding; the tokens of the second are held against the first's."""
    against = reason_against(answers.model)
    for name, way in (("dynamic", answers.cell), ("compiled", answers.compiled)):
        try:
            yield row | {"way": name, "reason_against_compiling": against} | way()
        except (RuntimeError, OSError, ValueError) as error:
            yield row | {"way": name, "failed": f"{type(error).__name__}: {error}"[:500]}


def merge_row(work: Work, flags: list[str], seconds: float) -> Row:
    """`vltrain merge` in processes of its own: seconds, peak of host memory, and its own proof."""
    size = sum(file.stat().st_size for file in work.base.glob("*.safetensors"))
    began = time.perf_counter()
    imports = memory_of_imports()
    out = work.folder / "merged"
    command = [sys.executable, "-m", "vltrain", "merge", str(work.adapter), str(out), *flags]
    try:
        peak, took = peak_of(command, imports, seconds - (time.perf_counter() - began))
        report = json.loads((out / "merge.json").read_text())
    finally:
        for left in work.folder.glob("*merged*"):
            shutil.rmtree(left)
    return {
        "flags": flags,
        "into": report["into"],
        "seconds": took,
        "anonymous_gib": peak.anonymous / GIB,
        "anonymous_over_model": peak.anonymous / size,
        "resident_gib": peak.resident / GIB,
        "resident_over_model": peak.resident / size,
        "imports_gib": imports.resident / GIB,
        "model_gib": size / GIB,
        "proof": report["proof"],
    }


def merge_part(work: Work, seconds: float, send: Send) -> Iterator[Row]:
    """The default: into the dequantized weights, proven by logits."""
    yield merge_row(work, [], seconds)


def low_memory_part(work: Work, seconds: float, send: Send) -> Iterator[Row]:
    """A shard in memory at a time, into the 16-bit base, proven tensor by tensor."""
    yield merge_row(work, ["--low-memory", "--into", "base"], seconds)


def logits_part(work: Work, seconds: float, send: Send) -> Iterator[Row]:
    """How far both merges answer from the model in NF4 with its adapter, which was trained."""
    yield nf4_row(work)
    inputs = probe_inputs(load_processor(work.base))
    held = load_model(work.base, dtype="bf16", device=device(), quantize=Nf4())
    model = attach(held, work.adapter).eval()
    trained = probe_logits(model, inputs)
    with model.disable_adapter():
        alone = probe_logits(model, inputs)
    yield {"compared": "4-bit base without adapter"} | differences(alone, trained, inputs)
    del model, held
    for into in ("base", "dequantized"):
        plan = plan_merge([(work.adapter, 1.0)], None, into)
        merged = load_model(work.base, dtype="bf16", device=device())
        began = time.perf_counter()
        with torch.no_grad():
            for name, parameter in merged.named_parameters():
                parameter.copy_(plan.merged.read(name))
        settle()
        row = {"compared": f"merged into {into}", "merging_seconds": time.perf_counter() - began}
        yield row | differences(probe_logits(merged, inputs), trained, inputs)
        del merged


def nf4_row(work: Work) -> Row:
    """Whether the CPU, where a merge dequantizes, has the same NF4 as the GPU that trained."""
    weights = plain_weights(work.base)
    weight = weights.read(next(f"{n}.weight" for n in linear_layers(weights.model, QWEN_VL)))
    began = time.perf_counter()
    there = dequantized_nf4(weight)
    took = time.perf_counter() - began
    here = dequantized_nf4(weight.to(device())).cpu()
    return {
        "nf4_of_cpu_as_of_gpu": float((there == here).float().mean()),
        "nf4_distance": distance(there, here),
        "nf4_seconds_on_cpu": took,
        "weights": weight.numel(),
    }


def differences(found: Tensor, trained: Tensor, inputs: list[dict[str, Tensor]]) -> Row:
    """Differences of logits, of the text and of the picture: as `merge.json` has them, and each
    over the spread of the trained model's logits."""
    lengths = [values["input_ids"].size(1) for values in inputs]
    row: Row = {"from_the_model_in_4_bits": distance(found, trained)}
    names = ("text", "picture")
    assert len(names) == len(PROBES)
    for name, a, b in zip(names, found.split(lengths), trained.split(lengths), strict=True):
        apart, spread = (a - b).abs(), float(b.std())
        row[name] = {
            "tokens": len(b),
            "from_the_model_in_4_bits": distance(a, b),
            "largest_over_spread": float(apart.max()) / spread,
            "mean_over_spread": float(apart.mean()) / spread,
            "spread": spread,
            "same_likeliest_token": float((a.argmax(-1) == b.argmax(-1)).float().mean()),
        }
    return row


PARTS: dict[str, Callable[[Work, float, Send], Iterator[Row]]] = {
    "int4": int4_part,
    "quantize": quantize_part,
    "merge": merge_part,
    "logits": logits_part,
    "low-memory": low_memory_part,
}
