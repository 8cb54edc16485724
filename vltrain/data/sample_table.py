"""Checked records, with what a run must know of each, as Arrow tables that stay on disk.

    records.arrow   `record`: each record as JSON
    numbers.arrow   whole numbers of each: the columns of `NUMBERS`, 4 bytes each
    files.json      the files that the records are in

Both are mapped into memory: of a million records a process holds the pages that it has looked at,
and the system takes those back where memory is short. The numbers lie apart from the records, so
that to read all lengths is to read nothing else.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

from vltrain.data.arrow_stream import ArrowStream
from vltrain.data.encoding import Sample
from vltrain.data.records import Record

if TYPE_CHECKING:
    from datasets import Dataset

NUMBERS = ("source", "file", "index", "tokens", "learned_tokens", "image_count", "largest_id")
"""Of the record: the place, among what a run reads, of what it is in; the place of its file among
the table's; its number there. Then of its sample."""

_FILE = NUMBERS.index("file")
BATCH_CHARACTERS = 16 << 20  # written together; to open a table is to look at each batch's head
RECORDS_FILE, NUMBERS_FILE, FILES_FILE = "records.arrow", "numbers.arrow", "files.json"


@dataclass(frozen=True)
class Rows:
    """Some rows of a table that follow each other."""

    records: list[str]  # JSON
    numbers: NDArray[np.int32]  # [rows, columns of NUMBERS]
    files: list[Path]  # that `numbers` counts


def rows_of(kept: Iterable[tuple[Record, Sample]]) -> Rows:
    """The rows of records and of the samples that they are encoded to."""
    files: dict[Path, int] = {}
    records: list[str] = []
    numbers: list[tuple[int, ...]] = []
    for record, sample in kept:
        # In ASCII: halves of surrogate pairs, which JSON may hold, are no UTF-8.
        records.append(json.dumps(record.value))
        place = files.setdefault(record.file, len(files))
        of_sample = (len(sample.input_ids), sample.learned_tokens, len(sample.images))
        largest_id = max(sample.input_ids)
        numbers.append((record.source, place, record.index, *of_sample, largest_id))
    table = np.array(numbers, np.int32).reshape(len(records), len(NUMBERS))
    return Rows(records, table, list(files))


class SampleTable:
    """The rows of a table by number, and its numbers by column."""

    def __init__(
        self, records: "Dataset", numbers: dict[str, NDArray[np.int32]], files: Sequence[Path]
    ) -> None:
        """`records` has the column `record`, `numbers` those of `NUMBERS`, `files` they count."""
        self._records = records
        self.numbers = numbers
        self.files = tuple(files)

    @classmethod
    def open(cls, folder: Path) -> Self:
        """The table that a `TableWriter` wrote, mapped into memory."""
        from datasets import Dataset

        records = Dataset.from_file(str(folder / RECORDS_FILE))
        columns = Dataset.from_file(str(folder / NUMBERS_FILE)).data
        numbers = {name: columns.column(name).to_numpy() for name in NUMBERS}
        names = json.loads((folder / FILES_FILE).read_text(encoding="utf-8"))
        return cls(records, numbers, [Path(name) for name in names])

    @classmethod
    def in_memory(cls, rows: Rows) -> Self:
        """A small table that no file holds."""
        from datasets import Dataset

        numbers = dict(zip(NUMBERS, rows.numbers.T, strict=True))
        return cls(Dataset.from_dict({"record": rows.records}), numbers, rows.files)

    def __len__(self) -> int:
        return len(self._records)

    def record(self, number: int) -> Record:
        """The record of a row."""
        value = json.loads(self._records.data.column("record")[int(number)].as_py())
        return Record(self._file(number), int(self.numbers["index"][number]), value)

    def name(self, number: int) -> str:
        """What errors call the record of a row; it is not read."""
        return Record(self._file(number), int(self.numbers["index"][number]), None).name

    def _file(self, number: int) -> Path:
        return self.files[self.numbers["file"][number]]


class TableWriter(ArrowStream):
    """Writes a table into a folder, rows after rows; their numbers are held until the end."""

    def __init__(self, folder: Path) -> None:
        import pyarrow as pa

        super().__init__(folder / RECORDS_FILE, pa.schema([("record", pa.large_string())]))
        self.folder = folder
        self._records: list[str] = []  # not written yet
        self._held_characters = 0
        self._numbers: list[NDArray[np.int32]] = []
        self._files: dict[Path, int] = {}

    def write(self, rows: Rows) -> None:
        """Add rows."""
        places = [self._files.setdefault(file, len(self._files)) for file in rows.files]
        rows.numbers[:, _FILE] = np.array(places, np.int32)[rows.numbers[:, _FILE]]
        self._numbers.append(rows.numbers)
        self._records += rows.records
        self._held_characters += sum(map(len, rows.records))
        if self._held_characters >= BATCH_CHARACTERS:
            self._write_records()

    def _write_records(self) -> None:
        self.write_batch([self._records])
        self._records, self._held_characters = [], 0

    def finish(self) -> None:
        self._write_records()
        self._write_numbers()

    def _write_numbers(self) -> None:
        """All numbers in one piece, so that each column is one array of the mapped file."""
        import pyarrow as pa

        empty = np.empty((0, len(NUMBERS)), np.int32)
        schema = pa.schema([(name, pa.int32()) for name in NUMBERS])
        with ArrowStream(self.folder / NUMBERS_FILE, schema) as stream:
            stream.write_batch(np.concatenate([empty, *self._numbers]).T)
        # In ASCII: names need not be UTF-8.
        names = json.dumps([str(file) for file in self._files])
        (self.folder / FILES_FILE).write_text(names, encoding="utf-8")
