"""Files -> samples, read piece by piece, over and over: for data larger than disk or memory.

Nothing is known of the records before they come: they are shuffled through a buffer, and what is
wrong with one stops the run where it comes up. Batch k of the run is its samples from k * B on,
B samples a batch; it belongs to process k % P of P, and there to worker (k // P) % W of W. So what
a step learns is the same for any number of workers. Every worker reads all records and makes
samples of its own alone.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from vltrain.data.dataset import DROPPED, RecordReader
from vltrain.data.encoding import Sample, TooLong, too_long_error
from vltrain.data.faults import error_of
from vltrain.data.records import Record
from vltrain.data.sources import scan_all
from vltrain.errors import VltrainError


@dataclass(frozen=True)
class Split:
    """Which batches of a run are this process's."""

    batch_size: int  # samples
    rank: int = 0
    processes: int = 1


@dataclass(frozen=True)
class Limits:
    """What a sample must not exceed."""

    max_length: int  # tokens, image tokens included
    too_long: TooLong = "error"
    vocabulary_size: int | None = None  # ids are below it; None: any


class SampleStream(IterableDataset[dict[str, Any]]):
    """The samples of one process without end: pass after pass over the files, each shuffled anew.

    The end of a pass is no end of an epoch: a run counts its steps, and a batch may hold the last
    samples of one pass and the first of the next.
    """

    def __init__(
        self,
        files: Sequence[Path],
        reader: RecordReader,
        limits: Limits,
        split: Split,
        *,
        buffer: int,
        seed: int,
    ) -> None:
        """Nothing is read yet.

        Args:
            files: what is read, one after the other.
            reader: makes samples of records.
            limits: of a sample.
            split: which of them are this process's.
            buffer: records that are held, of which the next is drawn.
            seed: of the draws.
        """
        super().__init__()
        self.files = tuple(files)
        self.reader, self.limits, self.split = reader, limits, split
        self.buffer, self.seed = buffer, seed

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The samples of this process and this worker: see `RecordReader.item`.

        Raises:
            VltrainError: a record is faulty; or too long, or with a bad picture, where such
                records are not dropped.
        """
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        for place, record in enumerate(self._records()):
            batch, rank = divmod(place // self.split.batch_size, self.split.processes)
            if rank == self.split.rank and batch % workers == worker:
                yield self._item(record)

    def _records(self) -> Iterator[Record]:
        """All records of all passes, in the order in which they are learned from."""
        for number in count():
            chance = random.Random(self.seed * 1_000_003 + number)
            found = False
            for record in shuffled(self._one_pass(), self.buffer, chance):
                found = True
                yield record
            if not found:
                files = ", ".join(map(str, self.files))
                raise VltrainError.at(files, what="there is no record", fix="add records")

    def _one_pass(self) -> Iterator[Record]:
        for entry in scan_all(self.files):
            if not isinstance(entry, Record):
                raise error_of([entry.fault], entry.name)
            yield entry

    def _item(self, record: Record) -> dict[str, Any]:
        sample = self.reader.encode(record)
        if len(sample.input_ids) > self.limits.max_length:
            error = too_long_error(
                sample, self.reader.processor, self.limits.max_length, record.name
            )
            if self.limits.too_long == "error":
                raise error
            return {DROPPED: str(error)}
        self._refuse_foreign_ids(sample, record)
        return self.reader.opened(sample, record)

    def _refuse_foreign_ids(self, sample: Sample, record: Record) -> None:
        rows, largest = self.limits.vocabulary_size, max(sample.input_ids)
        if rows is not None and largest >= rows:
            raise VltrainError.at(
                record.name,
                what=f"has the token id {largest}, and the model has ids 0 to {rows - 1}",
                fix="take the tokenizer and the weights of one checkpoint",
            )


def shuffled(records: Iterator[Record], buffer: int, chance: random.Random) -> Iterator[Record]:
    """Records in another order: each is drawn from the next `buffer` that have not been."""
    held: list[Record] = []
    for record in records:
        if len(held) < buffer:
            held.append(record)
            continue
        place = chance.randrange(buffer)
        yield held[place]
        held[place] = record
    chance.shuffle(held)
    yield from held
