"""Seconds a step and peak memory of each lever of the training step, alone and together.

    python benchmarks/step_speed.py --output step_speed.jsonl

A step learns from 8 samples of one 448x448 picture each, by LoRA of rank 64 on a Qwen-VL of the
real size with random weights, through the Trainer that a run uses. One JSON line a cell is written
as soon as it is known. A cell that fails or takes too long says so in its line, and the next one
follows; no cell is begun after `--seconds`. `--tiny` goes through all of them on a CPU with a small
model.

Model FLOPs are those that `vltrain profile` counts: vltrain.training.flops.
"""

import argparse
import gc
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from json_lines import tell
from real_size_lora import TOY, Samples, step_arguments
from torch import nn

from vltrain.config import FreezeConfig
from vltrain.data.collation import Collator, collate_rows
from vltrain.data.dataset import FEATURES
from vltrain.data.feature_store import FeatureStore
from vltrain.data.step_rows import StepRows
from vltrain.models.adapters import Adapter, add_lora
from vltrain.models.attention import attend_packed
from vltrain.models.catalog import QWEN_VL
from vltrain.models.features import compute_features, frozen_stage
from vltrain.models.fp8_weights import hold_in_fp8
from vltrain.models.hub import ResolvedModel
from vltrain.models.layer_runs import LayerRuns
from vltrain.models.qwen_vl import QwenVLConfig, QwenVLForConditionalGeneration
from vltrain.training.master_adamw import master_optimizer, narrow_learned
from vltrain.training.profiling import Measured, measure
from vltrain.workflows.base import Base
from vltrain.workflows.profile import work_of_model

STEP_SAMPLES = 8
PEAK_FLOPS = 780e12  # of one H100 in bf16, measured on large matrix products
PAD_ID = 151643
PICTURE = "picture"  # what features are kept under
SMALL = TOY | {"visual": TOY["visual"] | {"image_size": 56, "n_queries": 4}}


@dataclass(frozen=True)
class Cell:
    """One measurement: which levers are pulled, on samples of how many tokens."""

    name: str
    tokens: int
    packed: bool = True
    row_tokens: int = 16_384
    compiled: bool = True
    recompute_every: int = 0
    kept: float = 1.0  # share of what compiled layers keep for the way back
    dropout: float = 0.05
    embeddings: bool = False  # wte and lm_head learn too
    narrow: bool = False  # what learns is bf16, with float32 masters in the optimizer
    features: bool = False  # what the vision tower makes of pictures is read from the disk
    fp8: bool = False  # the decoder's frozen layers are held and multiplied in fp8
    steps: int = 4

    @property
    def warmup(self) -> int:
        """Steps before the measured ones: the first compile, and the allocator settles."""
        return 3 if self.compiled else 1


def cells(short: int, middle: int, long: int, longest: int) -> list[Cell]:
    """All of them, by the lengths of samples; the cheapest first."""
    fast = Cell("all, fast", short)
    lengths = (short, middle, long, longest)
    together = [replace(fast, tokens=tokens) for tokens in lengths]
    lean = [
        replace(fast, name="all, lean", tokens=tokens, row_tokens=tokens, kept=0.0)
        for tokens in lengths
    ]
    half = replace(fast, name="all, every second layer recomputed", recompute_every=2)
    whole = replace(fast, name="all, every layer recomputed", recompute_every=1)
    packed = replace(whole, name="packed alone", compiled=False)
    plain = replace(packed, name="none", packed=False, steps=3)
    base = replace(fast, name="Base: all, fast", embeddings=True)
    kept = replace(fast, name="all, fast, features kept", features=True)
    return [
        *together,
        replace(whole, tokens=longest),
        *reversed(lean),
        replace(packed, tokens=middle),
        replace(plain, tokens=middle),
        replace(plain, name="no recomputation alone", tokens=middle, recompute_every=0),
        replace(plain, name="compiled alone", tokens=middle, compiled=True),
        replace(half, tokens=longest),
        replace(fast, name="all, fast, half rows", tokens=longest, row_tokens=4 * longest),
        replace(packed, tokens=longest),
        replace(plain, tokens=longest),
        *(
            replace(fast, name=f"all, {share:.0%} kept", tokens=longest, kept=share)
            for share in (0.7, 0.5, 0.3)
        ),
        replace(fast, name="all, fast, bf16 adapters", tokens=middle, narrow=True),
        replace(
            fast,
            name="half rows, bf16 adapters",
            tokens=longest,
            narrow=True,
            row_tokens=4 * longest,
        ),
        *(replace(kept, tokens=tokens, row_tokens=4 * longest) for tokens in lengths),
        replace(base, tokens=short),
        replace(base, tokens=longest),
        replace(lean[-1], name="Base: all, lean", embeddings=True),
        replace(base, name="Base: all, fast, bf16 learned", tokens=longest, narrow=True),
        replace(fast, name="all, fast, no dropout", tokens=longest, dropout=0.0),
        replace(fast, name="all, fast, fp8", tokens=middle, fp8=True),
        replace(fast, name="half rows, fp8", tokens=longest, fp8=True, row_tokens=4 * longest),
    ]


class KeptSamples(Samples):
    """The same samples, with features of their picture in the place of its pixels."""

    def __init__(self, config: QwenVLConfig, tokens: int, count: int, store: FeatureStore) -> None:
        super().__init__(config, tokens, count)
        self.store = store

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = super().__getitem__(index)
        del sample["pixel_values"]
        features = self.store.read(self.store.place_of_content(PICTURE))
        return sample | {FEATURES: (self.store.input_name, [features])}


def keep_picture(model: nn.Module, config: QwenVLConfig, folder: Path) -> FeatureStore:
    """Where the image tokens of one random picture are kept."""
    stage = frozen_stage(model, QWEN_VL)
    on_gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if on_gpu else torch.float32
    name = str(dtype).removeprefix("torch.")
    store = FeatureStore(folder / "random", stage.input_name, stage.shape(config), name)
    side = config.vision.image_size
    pixels = torch.randn(1, 3, side, side)
    autocast = dtype if on_gpu else None
    made = compute_features(model, stage, pixels, dtype=dtype, autocast=autocast)
    store.keep(PICTURE, made[0])
    return store


class Models:
    """The model that a cell needs; one is held at a time."""

    def __init__(self, *, tiny: bool) -> None:
        self.config = QwenVLConfig(**(SMALL if tiny else {}))
        self.folder = Path(tempfile.mkdtemp())  # for features
        self._held: tuple[tuple[bool, float, bool, bool], nn.Module] | None = None

    def of(self, cell: Cell) -> nn.Module:
        """With random weights and adapters, on the GPU where there is one."""
        shape = (cell.embeddings, cell.dropout, cell.narrow, cell.fp8)
        if self._held is None or self._held[0] != shape:
            self._held = None
            torch._dynamo.reset()  # it compiles no more than some variants of a layer
            _free()
            adapter = Adapter(dropout=cell.dropout, embeddings=cell.embeddings)
            made = add_lora(self._base(), QWEN_VL, FreezeConfig(), adapter, seed=0)
            if cell.fp8:
                hold_in_fp8(made, QWEN_VL)
            self._held = (shape, made)
        model = self._held[1]
        if cell.narrow:
            narrow_learned(model)
        if cell.packed:
            attend_packed(model.get_base_model())
        else:
            model.get_base_model().set_attn_implementation("sdpa")
        return model

    def _base(self) -> nn.Module:
        on_gpu = torch.cuda.is_available()
        torch.set_default_dtype(torch.bfloat16 if on_gpu else torch.float32)
        self.config._attn_implementation = "sdpa"
        try:
            with torch.device("cuda" if on_gpu else "cpu"):
                base = QwenVLForConditionalGeneration(self.config)
        finally:
            torch.set_default_dtype(torch.float32)
        base.config.use_cache = False
        return base


def run_cell(cell: Cell, models: Models, backend: str) -> dict[str, Any]:
    """Train the cell's steps; what they took."""
    model = models.of(cell)
    steps = cell.warmup + cell.steps
    count = STEP_SAMPLES * (steps + 1)  # for what is read ahead in the last one
    samples = Samples(models.config, cell.tokens, count)
    if cell.features:
        store = keep_picture(model, models.config, models.folder)
        samples = KeptSamples(models.config, cell.tokens, count, store)
    layers = LayerRuns(cell.compiled, cell.recompute_every, cell.kept, backend)
    arguments = step_arguments(
        steps,
        1 if cell.packed else STEP_SAMPLES,
        gradient_checkpointing=False,
        bf16=cell.narrow or torch.cuda.is_available(),
    )
    if cell.packed:
        rows = StepRows(
            samples, step_samples=STEP_SAMPLES, row_tokens=max(cell.row_tokens, cell.tokens)
        )
        data, collate = rows, collate_rows
    else:
        data, collate = samples, Collator(PAD_ID)
    optimizer = master_optimizer(arguments) if cell.narrow else None
    measured = measure(model, arguments, data, collate, layers=layers, optimizer=optimizer)
    return figures(cell, models.config, model, measured)


def figures(
    cell: Cell, config: QwenVLConfig, model: nn.Module, measured: Measured
) -> dict[str, Any]:
    """A cell's line: sizes in GiB, times in seconds."""
    seconds = measured.seconds_per_step(cell.warmup)
    tokens = STEP_SAMPLES * cell.tokens
    work = step_flops(cell, config, model)
    return {
        "seconds_per_step": seconds,
        "all_seconds": measured.seconds,
        "compile_seconds": measured.seconds[0] - seconds if cell.compiled else None,
        "tokens_per_second": tokens / seconds,
        "model_flops": work,
        "utilisation": work / seconds / PEAK_FLOPS if torch.cuda.is_available() else None,
        "peak_gib": _gib(measured.peak_bytes),
        "reserved_gib": _gib(measured.reserved_bytes),
    }


def step_flops(cell: Cell, config: QwenVLConfig, model: nn.Module) -> int:
    """Of the work that a step is about, however it is done."""
    base = Base(ResolvedModel(Path(), None, "random weights"), QWEN_VL, config, processor=None)
    picture = len(QWEN_VL.example_picture(config).input_ids)
    return work_of_model(model, base).step_flops(
        tokens=STEP_SAMPLES * cell.tokens,
        learned=STEP_SAMPLES * (cell.tokens - picture),
        pictures=STEP_SAMPLES,
        skipped=frozen_stage(model, QWEN_VL).fed_by if cell.features else (),
    )


def _gib(size: int | None) -> float | None:
    return None if size is None else size / 2**30


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise TimeoutError where what is done within takes longer."""

    def ring(*_: Any) -> None:
        raise TimeoutError(f"took longer than {seconds:.0f} seconds")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def guarded(cell: Cell, models: Models, backend: str, seconds: float) -> dict[str, Any]:
    """A cell's line, or what went wrong."""
    began = time.perf_counter()
    try:
        with limited(seconds):
            found = run_cell(cell, models, backend)
    except Exception as error:  # whatever it is, the next cell may do
        found = {"error": f"{type(error).__name__}: {str(error)[:500]}"}
    _free()
    return asdict(cell) | found | {"cell_seconds": time.perf_counter() - began}


def main() -> None:
    """Measure the cells in order and write one JSON object a line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, help="a file for the lines, beside stdout")
    parser.add_argument("--only", nargs="+", default=[""], help="names that hold one of these")
    parser.add_argument("--exactly", nargs="+", default=[], help="cells of these names alone")
    parser.add_argument("--tokens", type=int, nargs="+", help="cells of these lengths alone")
    parser.add_argument("--seconds", type=float, default=450.0, help="no cell begins after them")
    parser.add_argument("--cell-seconds", type=float, default=150.0, help="of one cell")
    parser.add_argument("--backend", help="of torch.compile; default inductor, tiny: aot_eager")
    parser.add_argument("--tiny", action="store_true", help="a small model, on a CPU too")
    options = parser.parse_args()
    began = time.perf_counter()
    machine = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    models = Models(tiny=options.tiny)
    backend = options.backend or ("aot_eager" if options.tiny else "inductor")
    for cell in cells(16, 24, 32, 48) if options.tiny else cells(384, 512, 1024, 2048):
        named = any(text in cell.name for text in options.only)
        if options.exactly:
            named = cell.name in options.exactly
        if not named or cell.tokens not in (options.tokens or [cell.tokens]):
            continue
        left = options.seconds - (time.perf_counter() - began)
        if left <= 0:
            print(f"no time is left for {cell.name} at {cell.tokens} tokens", flush=True)
            continue
        tell(guarded(cell, models, backend, options.cell_seconds) | machine, options.output)


if __name__ == "__main__":
    main()
