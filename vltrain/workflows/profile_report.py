"""How `vltrain profile` tells what it measured: in lines, as a table and as JSON."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vltrain import __version__
from vltrain.config import Recipe
from vltrain.training.arguments import loading_workers
from vltrain.training.flops import CPU_SIDE, GPU_SIDE

WAITING_LIMIT = 0.01  # share of the time from which on waiting for data is worth a word


@dataclass(frozen=True)
class Span:
    """Tokens of a sample: from the least to the greatest; both are the same where all are."""

    shortest: int
    longest: int

    def __str__(self) -> str:
        alike = self.shortest == self.longest
        return f"{self.longest:,}" if alike else f"{self.shortest:,} to {self.longest:,}"


@dataclass(frozen=True)
class Row:
    """What steps of samples of some lengths took, or why they could not be taken."""

    tokens: Span  # of a sample
    seconds_per_step: float | None = None  # the median; of mixed lengths the mean
    waiting_share: float | None = None  # of the time, for data
    tokens_per_second: float | None = None
    learned_tokens_per_second: float | None = None
    flops: float | None = None  # of a step: see `flops.ModelWork`
    utilisation: float | None = None  # of the device's measured rate
    peak_gib: float | None = None  # that torch had allocated; None without a GPU
    reserved_gib: float | None = None  # that its allocator held
    seconds: tuple[float, ...] = ()  # of each measured step
    error: str | None = None


@dataclass(frozen=True)
class Setting:
    """What is measured, on what."""

    recipe: Recipe  # settled
    model: str
    random: bool  # weights
    dtype: str
    samples: int  # of a step
    rate: float  # FLOP/s of large products on this device
    kept: bool  # what a frozen vision tower makes of pictures

    @property
    def device(self) -> str:
        """Its name."""
        return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"

    @property
    def rate_in_words(self) -> str:
        """The rate that utilisation is a share of, and how it was found."""
        side = GPU_SIDE if torch.cuda.is_available() else CPU_SIDE
        return (
            f"{self.rate / 1e12:,.3g} TFLOP/s, measured here on products of {side} x {side} "
            f"matrices in {self.dtype}"
        )

    @property
    def workers(self) -> int:
        """Processes that read data."""
        return loading_workers(self.recipe.trainer)

    @property
    def workers_in_words(self) -> str:
        """Who reads data."""
        counted = f"{self.workers} worker{'s' * (self.workers != 1)}"
        return counted if self.workers else "the process that trains"


def headings(setting: Setting) -> Iterator[Text | str]:
    """What is measured, in lines."""
    recipe = setting.recipe
    weights = "random weights" if setting.random else "its own weights"
    yield Text(f"{recipe.method} · {setting.model} · {weights} in {setting.dtype}", "bold")
    yield (
        f"on {setting.device}, torch {torch.__version__}, transformers {transformers.__version__}"
    )
    checkpointing = "on" if recipe.trainer["gradient_checkpointing"] else "off"
    fp8 = ["frozen layers in fp8"] if recipe.lora.base == "fp8" else []
    levers = [
        *fp8,
        "packed" if recipe.data.packs else "padded",
        "layers compiled" if recipe.compile else "layers not compiled",
        f"memory: {recipe.memory}"
        if recipe.memory is not None
        else f"gradient checkpointing {checkpointing}",
        "features kept" if setting.kept else "a JPEG of 12 megapixels read for each sample",
        f"data read by {setting.workers_in_words}",
    ]
    yield f"a step: {setting.samples} samples of one picture; {', '.join(levers)}"


def line(row: Row) -> str:
    """A row as soon as it is known."""
    if row.error is not None:
        return f"{row.tokens} tokens: {row.error}"
    return f"{row.tokens} tokens: {row.seconds_per_step:.3g} s a step"


def show(console: Console, setting: Setting, rows: Sequence[Row]) -> None:
    """Print all rows as a table, and what its columns mean."""
    table = Table()
    on_gpu = torch.cuda.is_available()
    titles = ["tokens a sample", "s/step", *(["peak GiB"] if on_gpu else [])]
    for title in (*titles, "tokens/s", "learned/s", "MFU", "waiting"):
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(*_cells(row, on_gpu=on_gpu))
    console.print(table)
    console.print(
        f"MFU: model FLOP utilisation, of {setting.rate_in_words}", soft_wrap=True, highlight=False
    )
    console.print(
        "model FLOPs: for each weight of the language model and token 4 where it is frozen under "
        "what learns, 6 where it learns; of a frozen vision tower 2 for each patch. Attention's "
        "products, adapters and what is recomputed do not count",
        soft_wrap=True,
        highlight=False,
    )
    console.print(
        "learned/s: tokens that are learned; waiting: the share of the time in which there was "
        "nothing to do but to read data",
        soft_wrap=True,
        highlight=False,
    )
    if any((row.waiting_share or 0) > WAITING_LIMIT for row in rows):
        others = "" if setting.kept else ", or set data.cache_features: true"
        console.print(
            f"steps wait for data, read by {setting.workers_in_words}: raise "
            f"trainer.dataloader_num_workers{others}",
            soft_wrap=True,
            highlight=False,
        )


def _cells(row: Row, *, on_gpu: bool) -> list[str]:
    if row.error is not None:
        return [str(row.tokens), "does not fit"]
    return [
        str(row.tokens),
        f"{row.seconds_per_step:.3g}",
        *([f"{row.peak_gib:.1f}"] if on_gpu else []),
        f"{row.tokens_per_second:,.0f}",
        f"{row.learned_tokens_per_second:,.0f}",
        f"{row.utilisation:.1%}",
        f"{row.waiting_share:.1%}",
    ]


def as_object(setting: Setting, rows: Sequence[Row]) -> dict[str, Any]:
    """All figures; times in seconds, sizes in GiB."""
    recipe = setting.recipe
    return {
        "method": recipe.method,
        "model": setting.model,
        "weights": "random" if setting.random else "real",
        "dtype": setting.dtype,
        "device": setting.device,
        "versions": {
            "vltrain": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "samples_per_step": setting.samples,
        "lora_base": recipe.lora.base,
        "packing": recipe.data.packs,
        "compile": recipe.compile,
        "memory": recipe.memory,
        "gradient_checkpointing": recipe.trainer["gradient_checkpointing"],
        "cached_features": setting.kept,
        "workers": setting.workers,
        "flops_per_second": setting.rate,
        "flops_per_second_of": setting.rate_in_words,
        "rows": [
            asdict(row) | {"tokens": row.tokens.longest, "shortest_tokens": row.tokens.shortest}
            for row in rows
        ],
    }
