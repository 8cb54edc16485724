"""A recipe's data section -> what a run learns from and is evaluated on, all of it checked."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from vltrain.config import DataConfig
from vltrain.data.dataset import RecordReader, SampleDataset, split_numbers
from vltrain.data.encoding import Processor
from vltrain.data.findings import Report
from vltrain.data.mixing import Mix, mix_of
from vltrain.data.packing import PackedDataset
from vltrain.data.pictures import pictures_of
from vltrain.data.prepared import prepare
from vltrain.data.sample_table import SampleTable
from vltrain.errors import VltrainError
from vltrain.models.loading import foreign_id_error
from vltrain.workflows.inspect import checking_bar, print_report, refuse_errors


@dataclass(frozen=True)
class Halves:
    """What is learned from and, where a recipe asks for it, what is evaluated on."""

    train: SampleDataset
    evaluation: SampleDataset | None  # never packed: its loss compares with that of any run
    mix: Mix | None = None  # what an epoch shows of `train`; None: each sample once
    rows: PackedDataset | None = None  # the samples of an epoch, where the recipe packs them
    dropped: int = 0  # records that were left out: too long, or with a bad picture

    @property
    def epoch_units(self) -> tuple[int, str]:
        """What an epoch has of what a step takes: samples, or rows of them."""
        if self.rows is not None:
            return len(self.rows), "rows"
        return (len(self.train) if self.mix is None else len(self.mix)), "samples"

    @property
    def epoch(self) -> str:
        """What an epoch is, in words."""
        return f"{len(self.train):,} samples, each once" if self.mix is None else str(self.mix)


def read_data(console: Console, data: DataConfig, processor: Processor, *, seed: int) -> Halves:
    """Check every file, or see that none has changed since; eval samples come from their files
    or from a share.

    Raises:
        VltrainError: all that is wrong with the files.
    """
    files = [*data.files, *data.eval_files]

    def say(line: str) -> None:
        console.print(line, soft_wrap=True, highlight=False)

    with checking_bar() as advance:
        prepared = prepare(data, processor, say=say, on_checked=advance)
    if prepared.report.findings:
        print_report(prepared.report, console)
    refuse_errors(prepared.report, files, undone="trained")
    table = prepared.table
    assert table is not None, "data without errors has a table"
    # Files come one after the other: first those to learn from.
    learned = int(np.searchsorted(table.numbers["source"], len(data.files)))
    _refuse_empty(learned, prepared.report)
    if data.eval_files:
        _refuse_empty(len(table) - learned, prepared.report)
    numbers, held_out = split_numbers(learned, data.eval_share, seed)
    if data.eval_files:
        held_out = np.arange(learned, len(table), dtype=np.int32)
    reader = RecordReader(processor, data.labels, pictures_of(data), data.format, data.bad_pictures)
    samples = _samples(table, numbers, reader)
    mix = mix_of(data, samples.sources)
    return Halves(
        train=samples,
        # An eval loss over fewer samples would compare with no other.
        evaluation=_samples(table, held_out, replace(reader, bad_pictures="error"))
        if len(held_out)
        else None,
        mix=mix,
        rows=_rows(samples, data, mix, seed) if data.packing else None,
        dropped=prepared.report.dropped,
    )


def _samples(table: SampleTable, numbers: NDArray[np.int32], reader: RecordReader) -> SampleDataset:
    return SampleDataset(table, reader, None if len(numbers) == len(table) else numbers)


def _rows(samples: SampleDataset, data: DataConfig, mix: Mix | None, seed: int) -> PackedDataset:
    """The samples of an epoch, packed.

    What a mix draws of a file is drawn once and shown in every epoch: other samples would fill
    another number of rows, and a run that resumes counts its steps in rows.
    """
    numbers = None if mix is None else mix.numbers(seed=seed, epoch=0)
    return PackedDataset(samples, data.max_length, numbers)


def _refuse_empty(samples: int, report: Report) -> None:
    if not samples:
        raise VltrainError.at(
            "data",
            what=f"nothing is left: {report.dropped:,} of {report.records:,} records are dropped",
            fix="mend the pictures or raise data.max_length: the findings above say which",
        )


def refuse_foreign_ids(samples: SampleDataset, vocabulary_size: int, base: Path) -> None:
    """Raise VltrainError where a sample has an id that the embedding matrix has no row for.

    Args:
        samples: the model's.
        vocabulary_size: rows of the matrix.
        base: the folder of the model, for the error.
    """
    foreign = np.flatnonzero(samples.largest_ids >= vocabulary_size)
    if len(foreign):
        first = int(foreign[0])
        largest = int(samples.largest_ids[first])
        raise foreign_id_error(samples.name(first), largest, vocabulary_size, base)


def plan_of(halves: Halves) -> Iterator[str]:
    """What there is to learn from, in lines."""
    samples = halves.train
    yield (
        f"{len(samples):,} samples, {int(samples.lengths.sum(dtype=np.int64)):,} tokens "
        f"({int(samples.learned_tokens.sum(dtype=np.int64)):,} learned), "
        f"{int(samples.image_counts.sum(dtype=np.int64)):,} pictures; "
        f"longest {int(samples.lengths.max()):,} tokens, {halves.dropped:,} dropped"
    )
    if halves.mix is not None:
        yield f"an epoch: {halves.mix}"
    if halves.evaluation is not None:
        yield f"{len(halves.evaluation):,} samples to evaluate on"
    rows = halves.rows
    if rows is not None:
        yield (
            f"packed into {len(rows):,} rows of up to {rows.row_tokens:,} tokens, "
            f"{rows.fill:.1%} full"
        )
