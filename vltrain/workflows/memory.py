"""What a run will take of a GPU's memory, shown before it starts; what cannot fit is refused."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import TrainingArguments

from vltrain.config import Recipe
from vltrain.data.packing import Row
from vltrain.data.step_rows import StepRows
from vltrain.data.streaming import SampleStream
from vltrain.errors import VltrainError
from vltrain.models.layer_runs import LayerRuns
from vltrain.models.loading import DTYPES
from vltrain.models.loss import gpus_have_kernels
from vltrain.models.sizes import Census, ModelSizes, Place
from vltrain.training.activations import BatchSizes, Compute
from vltrain.training.arguments import run_dtype
from vltrain.training.engines import NO_ENGINE, Engine, Load
from vltrain.training.epoch_order import step_order
from vltrain.training.full_weights import HELD, HeldWeights
from vltrain.training.memory import (
    CONTEXT_BYTES,
    GIB,
    Estimate,
    estimate,
    largest_batch,
)
from vltrain.training.moments import Work
from vltrain.training.optimizer_bytes import Optimizer
from vltrain.training.sharing import sharing_of
from vltrain.workflows.prepare import layer_runs_of
from vltrain.workflows.run_data import Halves, Packer

EVERY = (4, 3, 2)
"""Each so-many-th layer that is recomputed, as `memory: auto` tries them."""

SHARES = (0.75, 0.5)
"""Of what compiled layers keep, as `memory: auto` tries them."""

UNCERTAIN_BYTES = 512 * 2**20
"""Of what a GPU is told to hold: contexts and libraries of the process itself differ by so much."""

LABELS: dict[Place, str] = {
    "vision": "vision tower",
    "projector": "projector",
    "embeddings": "embeddings",
    "layers": "decoder layers",
    "head": "head",
    "adapter": "adapter",
}


@dataclass(frozen=True)
class RunMemory:
    """A run as far as memory goes, and the memory it takes."""

    census: Census
    sizes: ModelSizes
    batch: BatchSizes
    work: Work
    engine: Engine = NO_ENGINE
    decisions: tuple[str, ...] = ()  # what the recipe leaves open and the run decides, in words
    held: HeldWeights | None = None  # how a full run holds what learns
    whole_steps: bool = False  # the batches are rows that a step's samples fill

    @property
    def estimate(self) -> Estimate:
        """Bytes of one process on its GPU."""
        return estimate(self.census, self.sizes, self.batch, self.work)

    def largest_batch(self, gpu_bytes: int) -> int:
        """Rows like those of the batch that fit a GPU of that size at a time."""
        return largest_batch(self.census, self.sizes, self.batch, self.work, gpu_bytes)


def work_of(
    recipe: Recipe,
    arguments: TrainingArguments,
    engine: Engine,
    processes: int,
    held: HeldWeights | None = None,
    halves: Halves | None = None,
) -> Work:
    """What of a recipe decides about memory, beside model and batch, on a GPU.

    Layers of 4 bits count as not compiled: what theirs keep is not known, and it is no more.

    Args:
        processes: that share the model out.
        held: how a full run holds what it learns.
        halves: the run's data; None where it is not known.
    """
    checkpointing = getattr(arguments, "activation_checkpointing", None)
    if checkpointing is None:  # its name before transformers 5.23
        checkpointing = arguments.gradient_checkpointing
    layers = layer_runs_of(recipe, engine)
    if layers is not None:
        checkpointing = layers.recompute_every > 0
    compute = Compute(
        bytes=DTYPES[run_dtype(recipe)].itemsize,
        attention="packed" if recipe.data.packs else "sdpa",
        checkpointing=checkpointing,
        kept_share=1.0 if layers is None else layers.kept,
        compiled=layers is not None and layers.compiled and recipe.method != "qlora",
        keeps_read=engine.wraps_linear(compiled=recipe.compile is True),
        loss_kernels=gpus_have_kernels(),
    )
    optimizer = Optimizer(str(getattr(arguments.optim, "value", arguments.optim)))
    if held in HELD:
        optimizer = Optimizer("adamw_8bit", residual=held == "residual")
    if recipe.method == "lora" and recipe.lora.weights == "bf16":
        optimizer = Optimizer("adamw_torch_fused", masters=True)
    several = has_several_batches(recipe, arguments, halves, processes)
    # Of a step that comes whole FSDP2 sums each row's gradients at once (`step_batches`).
    late = engine.name == "fsdp2" and several and recipe.batch.samples is None
    sharing = replace(sharing_of(engine, processes), sums_late=late)
    return Work(compute, optimizer, several, sharing)


def has_several_batches(
    recipe: Recipe, arguments: TrainingArguments, halves: Halves | None, processes: int
) -> bool:
    """Whether gradients are there from earlier batches of a step, as far as is known."""
    samples, data = recipe.batch.samples, recipe.data
    if samples is None:
        return arguments.gradient_accumulation_steps > 1
    if halves is not None and isinstance(halves.rows, StepRows):
        return longest_share(halves.train.lengths, halves.rows) > halves.rows.row_tokens
    budget = Packer(data, samples, processes, seed=0).row_tokens
    return -(-samples // processes) * data.max_length > budget


def fit_layers(run: RunMemory, gpu_bytes: int) -> RunMemory:
    """The run with as little recomputed as its GPU's memory asks for.

    Args:
        gpu_bytes: the memory of the GPU, whole.
    """
    for fitted in ways_to_fit(run):
        if fitted.estimate.comfortable <= gpu_bytes:
            break
    compute = fitted.work.compute
    every = compute.recompute_every if compute.checkpointing else 0
    what = {0: "no layer", 1: "every layer"}.get(every, f"one layer in {every}")
    if compute.kept_share == 0:
        what = "every layer"
    elif compute.kept_share < 1:
        what = f"within each layer, which keeps {compute.kept_share:.0%}"
    line = f"recomputed on the way back: {what} (memory: auto)"
    return replace(fitted, decisions=(*run.decisions, line))


def ways_to_fit(run: RunMemory) -> list[RunMemory]:
    """The run with less and less kept for the way back, to every layer recomputed."""
    compute = run.work.compute
    whole = replace(compute, checkpointing=False, recompute_every=1, kept_share=1.0)
    if compute.compiled:
        partly = [replace(whole, kept_share=share) for share in SHARES]
    else:
        partly = [replace(whole, checkpointing=True, recompute_every=every) for every in EVERY]
    ways = [whole, *partly, whole.all_recomputed()]
    return [replace(run, work=replace(run.work, compute=way)) for way in ways]


def layers_of(recipe: Recipe, engine: Engine, run: RunMemory | None) -> LayerRuns | None:
    """How a run's layers are run, what its GPU's memory asks for included.

    Args:
        run: as `fit_layers` has it; None where there is no GPU.
    """
    layers = layer_runs_of(recipe, engine)
    if layers is None or run is None or recipe.memory != "auto":
        return layers
    compute = run.work.compute
    every = compute.recompute_every if compute.checkpointing else 0
    return replace(layers, recompute_every=every, kept=compute.kept_share)


def load_of(census: Census, recipe: Recipe) -> Load:
    """A run's parameters, as the choice of an engine weighs them."""
    weights = census.all
    width = DTYPES[run_dtype(recipe)].itemsize
    return Load(weights.learned, weights.total - weights.learned, width)


def largest_batch_of(
    recipe: Recipe, sizes: ModelSizes, halves: Halves, arguments: TrainingArguments
) -> BatchSizes:
    """The largest batch that a process may take of the data at a time.

    What is streamed is not known before: a sample is then as long as it may be and has a picture.
    """
    samples, rows = halves.train, halves.rows
    count = arguments.per_device_train_batch_size
    if isinstance(samples, SampleStream):
        return assumed_batch(recipe, sizes, pictures=1, rows=count, processes=1)
    if rows is None:
        return padded_batch(samples.lengths, samples.learned_tokens, samples.image_counts, count)
    if isinstance(rows, StepRows):
        order = step_order(rows, arguments.seed, halves.mix)
        packed: Iterable[Row] = (row for share in order for row in share)
        row_tokens = most_of_a_row(samples.lengths, rows)
    else:
        packed, row_tokens = rows.rows(seed=arguments.seed, epoch=0), rows.row_tokens
    return packed_batch(
        packed, samples.learned_tokens, samples.image_counts, row_tokens=row_tokens, rows=count
    )


def most_of_a_row(lengths: Sequence[int], rows: StepRows) -> int:
    """Tokens that a row of a step may hold: the budget, or the longest samples of a step."""
    return min(rows.row_tokens, longest_share(lengths, rows))


def longest_share(lengths: Sequence[int], rows: StepRows) -> int:
    """Tokens that a process may have of a step, of the one that has the longest samples.

    Of several, the one with most has at most its even share and the longest sample but one
    process's part of it (Graham, Bounds on Multiprocessing Timing Anomalies, 1969).
    """
    longest = np.sort(np.asarray(lengths))[-rows.step_samples :].astype(np.int64)
    even = -(-int(longest.sum()) // rows.processes)
    return even + int(longest[-1]) * (rows.processes - 1) // rows.processes


def padded_batch(
    lengths: Sequence[int], learned: Sequence[int], pictures: Sequence[int], rows: int
) -> BatchSizes:
    """The largest batch of padded samples: the longest one in each row, with most pictures.

    Args:
        lengths, learned, pictures: tokens, learned ones and pictures of each sample.
        rows: samples that a process takes at a time.
    """
    return BatchSizes(
        rows=rows,
        row_tokens=int(max(lengths)),
        learned_tokens=rows * int(max(learned)),
        pictures=rows * int(max(pictures)),
    )


def packed_batch(
    packed: Iterable[Row],
    learned: Sequence[int],
    pictures: Sequence[int],
    *,
    row_tokens: int,
    rows: int,
) -> BatchSizes:
    """The largest batch of packed rows.

    Args:
        packed: the numbers of the samples in each row.
        learned, pictures: tokens and pictures of each sample.
        row_tokens: of a full row.
        rows: that a process takes at a time.
    """
    most_learned = most_pictures = 0
    for row in packed:
        most_learned = max(most_learned, sum(int(learned[n]) for n in row))
        most_pictures = max(most_pictures, sum(int(pictures[n]) for n in row))
    return BatchSizes(rows, row_tokens, rows * most_learned, rows * most_pictures)


def assumed_batch(
    recipe: Recipe, sizes: ModelSizes, pictures: int, rows: int, processes: int
) -> BatchSizes:
    """A batch as a recipe allows it, where no data is known: rows are full, all text is learned.

    Raises:
        VltrainError: so many pictures do not fit a sample.
    """
    tower = sizes.tower
    seen = pictures * (tower.image_tokens + tower.marks)
    room = recipe.data.max_length
    if seen >= room:
        raise VltrainError.at(
            "--pictures",
            what=f"{pictures} take {seen} tokens, and a sample has {room} (data.max_length)",
            fix="give fewer pictures, or raise data.max_length",
        )
    row_tokens, together = room, 1
    if recipe.batch.samples is not None:
        budget = Packer(recipe.data, recipe.batch.samples, processes, seed=0).row_tokens
        together = min(-(-recipe.batch.samples // processes), budget // room)
        row_tokens = together * room
    elif recipe.data.packs and recipe.data.row_tokens != "auto":
        row_tokens = recipe.data.row_tokens
        together = row_tokens // room
    return BatchSizes(
        rows, row_tokens, rows * (row_tokens - together * seen), rows * together * pictures
    )


def gpu_memory() -> int | None:
    """Bytes of the GPU that a run would take; None where there is none."""
    if not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory


def held_by_others() -> int:
    """Bytes of this process's GPU that other programs hold; of little it is not sure, and none."""
    if not torch.cuda.is_available():
        return 0
    free, whole = torch.cuda.mem_get_info()
    others = whole - free - torch.cuda.memory_reserved() - CONTEXT_BYTES
    return others if others > UNCERTAIN_BYTES else 0


def parts(memory: Estimate) -> Iterator[tuple[str, int]]:
    """The estimate's parts that are there, at its peak; they add up to its total. Bytes."""
    for place, label in LABELS.items():
        if place in memory.weights:
            yield f"weights: {label}", memory.weights[place]
    peak = memory.peak
    yield "gradients", peak.gradients
    yield "optimizer", memory.optimizer
    yield "activations: decoder", peak.activations
    yield "activations: vision", peak.vision
    yield "logits", peak.logits
    yield "copies of weights and gradients", peak.copies
    yield "workspace", memory.workspace


def show_memory(console: Console, run: RunMemory, gpu_bytes: int | None) -> None:
    """Print the estimate by part, its total, and what fits.

    Args:
        gpu_bytes: of the GPU; None where no size is known.
    """
    memory, batch = run.estimate, run.batch
    table = Table(title="GPU memory, estimated", title_justify="left")
    table.add_column("part")
    table.add_column("GiB", justify="right")
    for label, size in parts(memory):
        if size:
            table.add_row(label, f"{size / GIB:.2f}")
    table.add_row("all", f"{memory.total / GIB:.2f}", style="bold")
    console.print(table)
    console.print(
        f"at its highest in {memory.peak.name}, with {batch.rows} x {batch.row_tokens:,} tokens "
        f"({batch.learned_tokens:,} learned) and {_pictures(batch.pictures)}",
        soft_wrap=True,
    )
    if run.engine.name != "none":
        console.print(
            f"GPUs: {run.work.sharing.processes}, each as said, under {run.engine}: "
            f"{run.engine.reason}",
            soft_wrap=True,
        )
    if memory.off_gpu:
        size = memory.off_gpu / GIB
        console.print(f"optimizer's states that may lie in host memory: {size:.2f} GiB")
    if not run.work.optimizer.known:
        name = run.work.optimizer.name
        console.print(f"trainer.optim {name} is not known here: counted as AdamW is")
    if gpu_bytes is not None:
        console.print(_verdict(run, gpu_bytes), soft_wrap=True)


def _pictures(count: int) -> str:
    return f"{count} picture" if count == 1 else f"{count} pictures"


def _verdict(run: RunMemory, gpu_bytes: int) -> str:
    """Whether it fits a GPU, and how large a batch does."""
    memory = run.estimate
    needs = (
        f"with the driver {memory.needed / GIB:.1f} GiB, and up to {memory.comfortable / GIB:.1f} "
        f"with what torch's allocator keeps; the GPU has {gpu_bytes / GIB:.1f}"
    )
    if memory.needed > gpu_bytes:
        return f"{needs}: it does not fit"
    if memory.comfortable > gpu_bytes:
        return f"{needs}: it may just fit"
    if run.whole_steps:
        return f"{needs}: it fits"
    return f"{needs}: a batch of up to {run.largest_batch(gpu_bytes)} fits"
