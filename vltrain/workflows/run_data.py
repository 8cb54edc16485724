"""A recipe's data section -> what a run learns from and is evaluated on, all of it checked."""

import time
from collections.abc import Iterator, Sequence
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
from vltrain.data.prepared import check_as_run, prepare
from vltrain.data.sample_table import SampleTable
from vltrain.data.step_rows import StepRows
from vltrain.data.streaming import Limits, SampleStream, Split
from vltrain.errors import VltrainError
from vltrain.models.loading import foreign_id_error
from vltrain.training.processes import PATIENCE_SECONDS
from vltrain.workflows.inspect import checking_bar, print_report, refuse_errors

WIDE_ROW = 8_192  # tokens: twice as many ask for recomputing on 80 GB, and are slower then
STREAM_CHECKED = 1000  # records of each streamed file that are checked before the run


@dataclass(frozen=True)
class Halves:
    """What is learned from and, where a recipe asks for it, what is evaluated on."""

    train: SampleDataset | SampleStream
    evaluation: SampleDataset | None  # never packed: its loss compares with that of any run
    mix: Mix | None = None  # what an epoch shows of `train`; None: each sample once
    rows: PackedDataset | StepRows | None = None  # the epoch's samples, where they are packed
    dropped: int = 0  # records that were left out: too long, or with a bad picture

    @property
    def epoch_units(self) -> tuple[int, str]:
        """What an epoch has of what a step takes: samples, or rows of them; 0 of a stream."""
        if isinstance(self.rows, StepRows):
            return len(self.rows), "shares of steps"
        if self.rows is not None:
            return len(self.rows), "rows"
        if self.mix is not None:
            return len(self.mix), "samples"
        return 0 if isinstance(self.train, SampleStream) else len(self.train), "samples"

    @property
    def epoch(self) -> str:
        """What an epoch is, in words."""
        if isinstance(self.train, SampleStream):
            return "none: records are streamed"
        return f"{len(self.train):,} samples, each once" if self.mix is None else str(self.mix)

    @property
    def shows_pictures(self) -> bool:
        """Whether any sample has a picture, as far as is known."""
        tables = [half for half in (self.train, self.evaluation) if isinstance(half, SampleDataset)]
        streamed = isinstance(self.train, SampleStream)
        return streamed or any(bool(half.image_counts.any()) for half in tables)


def read_data(
    console: Console,
    data: DataConfig,
    processor: Processor,
    *,
    seed: int,
    split: Split,
    vocabulary_size: int,
    step_samples: int | None = None,
) -> Halves:
    """Check the data and make it ready.

    Every file is checked, or seen not to have changed since; eval samples come from their files
    or from a share. Of files that are streamed only the first records of each are checked.

    Args:
        console: told what is found and done.
        data: the recipe's section.
        processor: encodes.
        seed: of all that chance decides.
        split: which batches of a stream are this process's.
        vocabulary_size: ids of a stream's samples must be below it.
        step_samples: of each optimizer step, to be packed step by step; None: packed samples
            fill rows of the whole epoch.

    Raises:
        VltrainError: all that is wrong with the files.
    """
    reader = RecordReader(processor, data.labels, pictures_of(data), data.format, data.bad_pictures)
    if not data.streaming:
        packer = Packer(data, step_samples, split.processes, seed)
        return _tables(console, data, reader, seed, packer)
    _check_begin(console, data, processor)
    files = replace(data, files=data.eval_files, eval_files=())
    return Halves(
        train=SampleStream(
            data.files,
            reader,
            Limits(data.max_length, data.too_long, vocabulary_size),
            split,
            buffer=data.shuffle_buffer,
            seed=seed,
        ),
        evaluation=_for_evaluation(*_prepared(console, files, processor), reader)
        if data.eval_files
        else None,
    )


def _check_begin(console: Console, data: DataConfig, processor: Processor) -> None:
    """Raise VltrainError for what is wrong with the first records of files that are streamed."""
    report = check_as_run(data.files, data, processor, most=STREAM_CHECKED)
    _show_and_refuse(console, report, data.files)


def _prepared(
    console: Console, data: DataConfig, processor: Processor
) -> tuple[SampleTable, Report]:
    """The checked records of all files of a recipe, and what else was found of them."""

    def say(line: str) -> None:
        console.print(line, soft_wrap=True, highlight=False)

    with checking_bar() as advance:
        prepared = prepare(data, processor, say=say, on_checked=advance)
    _show_and_refuse(console, prepared.report, [*data.files, *data.eval_files])
    assert prepared.table is not None, "data without errors has a table"
    return prepared.table, prepared.report


def _show_and_refuse(console: Console, report: Report, files: Sequence[Path]) -> None:
    """Print what was found in files, and raise VltrainError where it is errors.

    A silent process of several that has found them first lets the one that prints come to them
    too, and speaks itself if that takes long: the first to fail ends all.
    """
    if report.findings:
        print_report(report, console)
    if report.errors and console.quiet:
        time.sleep(PATIENCE_SECONDS)
    refuse_errors(report, files, undone="trained", printed=not console.quiet)


def _tables(
    console: Console, data: DataConfig, reader: RecordReader, seed: int, packer: "Packer"
) -> Halves:
    """What is learned from and evaluated on, of files that are checked whole."""
    table, report = _prepared(console, data, reader.processor)
    # Files come one after the other: first those to learn from.
    learned = int(np.searchsorted(table.numbers["source"], len(data.files)))
    _refuse_empty(learned, report)
    numbers, held_out = split_numbers(learned, data.eval_share, seed)
    if data.eval_files:
        held_out = np.arange(learned, len(table), dtype=np.int32)
    samples = SampleDataset(table, reader, None if len(numbers) == len(table) else numbers)
    mix = mix_of(data, samples.sources)
    return Halves(
        train=samples,
        evaluation=_for_evaluation(table, report, reader, held_out) if data.has_eval else None,
        mix=mix,
        rows=packer.rows(samples, mix) if data.packs else None,
        dropped=report.dropped,
    )


def _for_evaluation(
    table: SampleTable,
    report: Report,
    reader: RecordReader,
    numbers: NDArray[np.int32] | None = None,
) -> SampleDataset:
    """Samples to evaluate on; None: all of the table. A bad picture stops the run: an eval loss
    over fewer samples would compare with no other."""
    _refuse_empty(len(table) if numbers is None else len(numbers), report)
    return SampleDataset(table, replace(reader, bad_pictures="error"), numbers)


def wide_row(data: DataConfig) -> int:
    """Tokens of a packed row of a step on a GPU, where the recipe leaves them open."""
    return max(data.max_length, WIDE_ROW)


@dataclass(frozen=True)
class Packer:
    """How a recipe packs samples."""

    data: DataConfig
    step_samples: int | None  # of an optimizer step; None: rows come of the whole epoch
    processes: int
    seed: int

    @property
    def row_tokens(self) -> int:
        """How many tokens a row may hold."""
        auto = self.data.row_tokens == "auto"
        return self.data.max_length if auto else self.data.row_tokens

    def rows(self, samples: SampleDataset, mix: Mix | None) -> PackedDataset | StepRows:
        """The samples of an epoch, packed.

        Without steps of so many samples, what a mix draws of a file is drawn once and shown in
        every epoch: other samples would fill another number of rows, and a run that resumes
        counts its steps in rows.
        """
        if self.step_samples is not None:
            return StepRows(
                samples,
                step_samples=self.step_samples,
                row_tokens=self.row_tokens,
                epoch_samples=None if mix is None else len(mix),
                processes=self.processes,
            )
        numbers = None if mix is None else mix.numbers(seed=self.seed, epoch=0)
        return PackedDataset(samples, self.row_tokens, numbers)


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
    if isinstance(samples, SampleStream):
        yield (
            f"streamed from {', '.join(file.name for file in samples.files)}, "
            f"{samples.buffer:,} records held to draw from; the first {STREAM_CHECKED:,} of each "
            "file are checked, others when they come"
        )
    else:
        yield (
            f"{len(samples):,} samples, {_total(samples.lengths):,} tokens "
            f"({_total(samples.learned_tokens):,} learned), "
            f"{_total(samples.image_counts):,} pictures; "
            f"longest {int(samples.lengths.max()):,} tokens, {halves.dropped:,} dropped"
        )
    if halves.mix is not None:
        yield f"an epoch: {halves.mix}"
    if halves.evaluation is not None:
        yield f"{len(halves.evaluation):,} samples to evaluate on"
    rows = halves.rows
    if isinstance(rows, StepRows):
        yield (
            f"the {rows.step_samples:,} samples of each step are packed into rows of up to "
            f"{rows.row_tokens:,} tokens"
        )
    elif rows is not None:
        yield (
            f"packed into {len(rows):,} rows of up to {rows.row_tokens:,} tokens, "
            f"{rows.fill:.1%} full"
        )


def _total(numbers: NDArray[np.int32]) -> int:
    return int(numbers.sum(dtype=np.int64))
