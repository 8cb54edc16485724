"""Training steps of a small model on a CPU, beside a plain loop of `transformers`; and its data.

    vltrain demo demo
    python benchmarks/cpu_loop.py demo --output cpu_loop.jsonl

LoRA of the demo's model on the demo's conversations, in float32, 32 samples a step, by four loops:
`transformers.Trainer` with the loss of transformers, which computes the logits of every place; and
vltrain's, padded, padded with samples of like length together, and packed. All begin with the same
weights, and all but the third take the same samples in each step. Medians behind two steps that are
not counted; tokens a second are those of all counted steps together. Then how many samples a second
are opened, encoded and put into batches, by how many processes: of the demo, and with a JPEG of 12
megapixels each. One JSON line a cell.
"""

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers
from json_lines import tell
from own_process import Row, rows_of
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import PrinterCallback
from transformers.loss.loss_utils import ForCausalLMLoss

from vltrain.config import Recipe, load_recipe
from vltrain.data.collation import Collator, collate_rows
from vltrain.data.dataset import RecordReader
from vltrain.data.records import Record
from vltrain.training.arguments import training_arguments
from vltrain.training.made_up import MadeUpSamples, spread_lengths, write_photo
from vltrain.training.profiling import StepClock
from vltrain.training.trainer import TokenCounts, Trainer
from vltrain.workflows.base import Base, read_base, read_halves
from vltrain.workflows.prepare import prepare_model

STEP_SAMPLES, WARMUP_STEPS = 32, 2
LOOPS = {
    "transformers, padded": (),
    "vltrain, padded": (),
    "vltrain, padded, by length": ("trainer.train_sampling_strategy=group_by_length",),
    "vltrain, packed": (
        *("data.packing=true", f"batch.samples={STEP_SAMPLES}", "data.row_tokens=8192"),
        "trainer.per_device_train_batch_size=1",
    ),
}
"""What is measured, with the keys that a recipe sets for it."""
READ_SECONDS = 12.0
PHOTO_TOKENS, PHOTOS = 384, 512


class PlainModel(nn.Module):
    """A model whose loss is what `transformers` computes of all logits; counts what it is given."""

    def __init__(self, model: nn.Module, vocabulary: int) -> None:
        super().__init__()
        self.model, self.vocabulary = model, vocabulary
        self.counts = TokenCounts()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        num_items_in_batch: Tensor | None = None,
        learned_places: Tensor | None = None,  # which a plain loop does not have
        **pictures: Tensor,
    ) -> dict[str, Tensor]:
        self.counts.add(attention_mask, labels)
        logits = self.model(input_ids=input_ids, attention_mask=attention_mask, **pictures).logits
        return {"loss": ForCausalLMLoss(logits, labels, self.vocabulary, num_items_in_batch)}


def recipe_of(demo: Path, folder: Path, steps: int, *settings: str) -> Recipe:
    """LoRA on the demo's model and conversations, in steps that leave nothing behind."""
    quiet = ("trainer.save_strategy='no'", "trainer.report_to=none", "trainer.logging_steps=1")
    step = (f"trainer.per_device_train_batch_size={STEP_SAMPLES}",)
    step += ("trainer.gradient_accumulation_steps=1", f"trainer.max_steps={WARMUP_STEPS + steps}")
    return load_recipe(
        None,
        method="lora",
        model=str(demo / "model"),
        data=[demo / "train.json"],
        output=folder,
        overrides=(
            *("dtype=fp32", "data.max_length=512", "lora.r=16", "lora.dropout=0"),
            *("trainer.gradient_checkpointing=false", "trainer.dataloader_num_workers=0"),
            *(*quiet, *step, *settings),
        ),
    )


def run_loop(name: str, demo: Path, steps: int) -> Row:
    """One loop; its steps' median, tokens a second, the share of padding, the first losses."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = recipe_of(demo, Path(folder), steps, *LOOPS[name])
        base = read_base(recipe.model)
        arguments = training_arguments(recipe)
        halves = read_halves(Console(quiet=True), recipe, base, arguments)
        device = torch.device("cpu")
        model = prepare_model(recipe, base.family, base.folder, device=device, seed=arguments.seed)
        clock, plain = StepClock(), name.startswith("transformers")
        if plain:
            model = PlainModel(model, base.vocabulary_size)
        trainer = (transformers.Trainer if plain else Trainer)(
            model=model,
            args=arguments,
            train_dataset=halves.train if halves.rows is None else halves.rows,
            data_collator=Collator(base.processor.pad_id) if halves.rows is None else collate_rows,
            callbacks=[clock],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    logs = [row for row in trainer.state.log_history if "loss" in row]
    measured = clock.seconds[WARMUP_STEPS:]
    seconds, mean_length = statistics.median(measured), float(halves.train.lengths.mean())
    if plain:
        padding = model.counts.summary(sum(clock.seconds))["padding_share"]
    else:
        padding = statistics.mean(row["padding_share"] for row in logs)
    return {
        "loop": name,
        "seconds_per_step": seconds,
        "fastest": min(measured),
        "slowest": max(measured),
        "tokens_per_second": STEP_SAMPLES * mean_length / statistics.mean(measured),
        "padding_share": padding,
        "losses": [row["loss"] for row in logs[:3]],
    }


def read(dataset: Dataset, collate: Callable[[Sequence[Any]], Any], workers: int) -> float:
    """Samples a second in batches, behind the first one of each process."""
    loader = DataLoader(
        dataset, batch_size=STEP_SAMPLES, shuffle=True, collate_fn=collate, num_workers=workers
    )
    batches, samples = iter(loader), 0
    for _ in range(max(1, workers)):
        next(batches)
    began = time.perf_counter()
    for batch in batches:
        samples += len(batch["input_ids"])
        if time.perf_counter() - began > READ_SECONDS:
            break
    return samples / (time.perf_counter() - began)


def photos(base: Base, folder: Path) -> MadeUpSamples:
    """Samples that each open the same JPEG of 12 megapixels."""
    picture = base.family.example_picture(base.config)
    write_photo(folder / "photo.jpg")
    shown = partial(
        RecordReader(picture).shown, [str(folder / "photo.jpg")], Record(folder, 0, None)
    )
    lengths = spread_lengths(PHOTO_TOKENS, PHOTO_TOKENS, PHOTOS)
    return MadeUpSamples(picture.input_ids, lengths, shown)


def measure_loop(name: str, demo: Path, steps: int, sender: Connection) -> None:
    sender.send(run_loop(name, demo, steps))
    sender.send(None)


def measure_reading(demo: Path, workers: int, sender: Connection) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = recipe_of(demo, folder / "run", 1)
        base = read_base(recipe.model)
        halves = read_halves(Console(quiet=True), recipe, base, training_arguments(recipe))
        collate = Collator(base.processor.pad_id)
        for what, samples in (("demo", halves.train), ("12 megapixels", photos(base, folder))):
            rate = read(samples, collate, workers)
            sender.send({"read": what, "workers": workers, "samples_per_second": rate})
    sender.send(None)


def main() -> None:
    """Measure all of it, each in a process of its own, and print a line as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("demo", type=Path, help="what `vltrain demo` has written")
    parser.add_argument("--output", type=Path, help="a file for the lines, beside stdout")
    parser.add_argument("--steps", type=int, default=12, help="measured, of each loop")
    parser.add_argument("--seconds", type=float, default=300.0, help="that a cell may take")
    options = parser.parse_args()
    machine = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
    }
    demo = options.demo.resolve()
    cells = [(measure_loop, (name, demo, options.steps)) for name in LOOPS]
    cells += [(measure_reading, (demo, workers)) for workers in (0, 1, 2)]
    for measure, arguments in cells:
        for row in rows_of(measure, arguments, options.seconds):
            tell(row | machine, options.output)


if __name__ == "__main__":
    main()
