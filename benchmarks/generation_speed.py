"""Tokens a second of answers at Qwen-VL's real size, one prompt at a time, random weights.

    python benchmarks/generation_speed.py --output generation.jsonl

One picture and text, 2,048 tokens with the 128 that are answered, the likeliest token each time.
bf16 and Int4 (each linear layer of the decoder random codes of 4 bits in groups of 128), over a
cache that grows, over one of a fixed size, and over that with the step compiled as `vltrain chat`
does it. Each row is one JSON object in the output as soon as it is known, or why it failed; each
kind of weights has a process of its own. `--tiny` runs all on a small model on a CPU.

`tokens_per_second` is of decoding: the answer's tokens but the first, over the time behind the
first. `first_token_seconds` is of prompt and picture. `compile_seconds` is what the first answer
waits for longer. `peak_gib` is what torch had allocated at most while it answered.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from json_lines import tell
from marlin_layer import MarlinLayer
from own_process import rows_of
from real_size_lora import TOY, Samples
from torch import Tensor, nn
from transformers import CompileConfig, GenerationConfig, PreTrainedModel

from vltrain.evaluation.compiled import CompiledSteps, cache_size, reason_against
from vltrain.models.int4_kernels import Int4Linear
from vltrain.models.qwen_vl import QwenVLConfig, QwenVLForConditionalGeneration

GIB = 2**30
GROUP = 128
SECONDS = {"bf16": 170.0, "int4-torch": 150.0, "int4-marlin": 400.0}
"""After which a kind of weights is given up. Marlin waits for nvcc, so it is measured if asked."""


@torch.no_grad()
def random_model(weights: str, tiny: bool) -> tuple[PreTrainedModel, float | None]:
    """A Qwen-VL in bf16 on the GPU (fp32 on a CPU), its decoder packed where asked.

    Returns:
        The model, and the error of the kernel that packed layers are in.
    """
    config = QwenVLConfig(**(TOY if tiny else {}))
    config._attn_implementation = "sdpa"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if device.type == "cuda" else torch.float32)
    error = None
    with device:
        model = QwenVLForConditionalGeneration(config)
        if weights != "bf16":
            kind = Int4Linear if weights == "int4-torch" else MarlinLayer
            error = kernel_error(kind)
            pack(model, kind)
    torch.set_default_dtype(torch.float32)
    return model.eval(), error


def pack(model: nn.Module, kind: type[nn.Module]) -> None:
    """Give the decoder's linear layers random codes of 4 bits, in place."""
    for name, plain in list(model.transformer.h.named_modules()):
        if isinstance(plain, nn.Linear):
            parent, _, own = name.rpartition(".")
            setattr(
                model.transformer.h.get_submodule(parent),
                own,
                kind(random_codes(plain), plain.weight.dtype),
            )


def random_codes(plain: nn.Linear) -> SimpleNamespace:
    """What a packed layer of a plain one's sizes holds: weights of about its own spread."""
    inputs, outputs = plain.in_features, plain.out_features
    words = {"low": -(2**31), "high": 2**31, "dtype": torch.int32}
    return SimpleNamespace(
        in_features=inputs,
        out_features=outputs,
        bits=4,
        group_size=GROUP,
        sym=True,
        qweight=torch.randint(size=(inputs // 8, outputs), **words),
        qzeros=torch.full((inputs // GROUP, outputs // 8), -0x77777778, dtype=torch.int32),  # 8s
        scales=torch.rand(inputs // GROUP, outputs).add(0.5).mul(0.004),
        g_idx=(torch.arange(inputs) // GROUP).int(),
        bias=torch.zeros(outputs),
    )


def kernel_error(kind: type[nn.Module]) -> float:
    """How far a packed layer's output is from that of the weight it stands for, relative."""
    codes = random_codes(nn.Linear(4 * GROUP, 2 * GROUP))
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    plain = (codes.qweight[:, None, :] >> shifts[None, :, None] & 15).flatten(0, 1) - 8
    plain = plain * codes.scales.float().repeat_interleave(GROUP, 0)
    x = torch.randn(3, codes.in_features)
    wanted = x.float() @ plain
    return float((kind(codes, x.dtype)(x).float() - wanted).norm() / wanted.norm())


def prompt_of(model: PreTrainedModel, tokens: int) -> dict[str, Tensor]:
    """A picture and random text, as `generate` takes them."""
    sample = Samples(model.config, tokens, 1)[0]
    ids = torch.tensor([sample["input_ids"]], device=model.device)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": sample["pixel_values"].to(model.device, model.dtype),
    }


def settings_of(new_tokens: int) -> GenerationConfig:
    """Greedy, and never at an end before `new_tokens`."""
    return GenerationConfig(
        do_sample=False, max_new_tokens=new_tokens, eos_token_id=None, pad_token_id=0
    )


class Answers:
    """Answers to one prompt, timed."""

    def __init__(self, model: PreTrainedModel, context: int, new_tokens: int, repeats: int) -> None:
        self.model, self.new_tokens, self.repeats = model, new_tokens, repeats
        self.prompt = prompt_of(model, context - new_tokens)
        self.prompt_tokens = self.prompt["input_ids"].size(1)
        self.first: Tensor | None = None  # the tokens of the first cell

    def timed(self, tokens: int, steps: CompiledSteps | None, **how: Any) -> tuple[float, Tensor]:
        """Seconds of an answer, and its tokens."""
        settings = settings_of(self.new_tokens)
        cache = {} if steps is None else steps.prepared(settings, self.prompt_tokens)
        settings.max_new_tokens = tokens
        settings.update(**how)
        settle()
        started = time.perf_counter()
        said = self.model.generate(**self.prompt, generation_config=settings, **cache)
        settle()
        return time.perf_counter() - started, said[0, self.prompt_tokens :]

    def cell(self, steps: CompiledSteps | None = None, **how: Any) -> dict[str, Any]:
        """What answers took; medians of `repeats`, after one that is not counted."""
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        warm, said = self.timed(self.new_tokens, steps, **how)
        firsts = [self.timed(1, steps, **how)[0] for _ in range(self.repeats)]
        wholes = [self.timed(self.new_tokens, steps, **how)[0] for _ in range(self.repeats)]
        first, whole = statistics.median(firsts), statistics.median(wholes)
        self.first = said if self.first is None else self.first
        cuda = torch.cuda.is_available()
        return {
            "tokens_per_second": (self.new_tokens - 1) / (whole - first),
            "first_token_seconds": first,
            "seconds": whole,
            "all_seconds": wholes,
            "warm_up_seconds": warm,
            "same_tokens": float((said == self.first).float().mean()),
            "same_first_tokens": int((said == self.first).int().cumprod(0).sum()),
            "peak_gib": torch.cuda.max_memory_allocated() / GIB if cuda else None,
            "reserved_gib": torch.cuda.max_memory_reserved() / GIB if cuda else None,
        }

    def compiled(self) -> dict[str, Any]:
        """A cell with the step compiled as in a conversation."""
        how = None
        against = reason_against(self.model)
        if not torch.cuda.is_available():  # traced alone, to see that it can be
            how = CompileConfig(backend="eager", mode=None, dynamic=False)
            how._compile_all_devices = True
        elif against is not None:
            return {"failed": against}
        steps = CompiledSteps(self.model, how)
        settle()
        started = time.perf_counter()
        prepared = steps.prepared(settings_of(self.new_tokens), self.prompt_tokens)
        settle()
        seconds = time.perf_counter() - started
        if not prepared:
            return {"failed": "the step does not compile; see stderr", "compile_seconds": seconds}
        return {"compile_seconds": seconds} | self.cell(steps)


def settle() -> None:
    """Wait for the GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def cells(weights: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Each way of decoding, in the order of what is surest."""
    started = time.perf_counter()
    model, error = random_model(weights, options.tiny)
    settle()
    made: dict[str, Any] = {"weights": weights, "kernel_error": error}
    made["making_seconds"] = time.perf_counter() - started
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        made["weights_gib"] = torch.cuda.memory_allocated() / GIB
    answers = Answers(model, options.context, options.new_tokens, options.repeats)
    fixed = {
        "cache_implementation": "static",
        "max_cache_len": cache_size(answers.prompt_tokens, options.new_tokens),
        "disable_compile": True,
    }
    ways = {
        "dynamic": answers.cell,
        "compiled": answers.compiled,
        "static": lambda: answers.cell(**fixed),
    }
    for name, way in ways.items():
        if name not in options.ways:
            continue
        try:
            yield made | {"way": name} | way()
        except (RuntimeError, OSError, ValueError) as error:
            yield made | {"way": name, "failed": f"{type(error).__name__}: {error}"[:500]}


def measure(weights: str, options: argparse.Namespace, answer: Connection) -> None:
    """Send each cell of a kind of weights, then None."""
    for cell in cells(weights, options):
        answer.send(cell)
    answer.send(None)


def main() -> None:
    """Measure each kind of weights while there is time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(tempfile.mkdtemp()) / "cells.jsonl")
    parser.add_argument("--weights", nargs="+", choices=SECONDS, default=["bf16", "int4-torch"])
    parser.add_argument("--ways", nargs="+", default=["dynamic", "compiled", "static"])
    parser.add_argument("--context", type=int, default=2048, help="tokens, the answer's included")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=250, help="for all together")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    if options.tiny:
        options.context, options.new_tokens, options.repeats = 320, 16, 1
    deadline = time.monotonic() + options.seconds
    for weights in options.weights:
        left = min(deadline - time.monotonic(), SECONDS[weights])
        for row in rows_of(measure, (weights, options), left):
            cell = {"weights": weights} | row
            cell |= {"context": options.context, "new_tokens": options.new_tokens}
            cell |= {"torch": torch.__version__, "transformers": transformers.__version__}
            cell["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
            tell(cell, options.output)


if __name__ == "__main__":
    main()
