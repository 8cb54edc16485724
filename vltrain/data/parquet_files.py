"""Parquet files and folders of them -> records, a few rows in memory at a time."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from vltrain.data.arrow_rows import batch_rows, first_line, records_of_batch, unreadable_rows
from vltrain.data.faults import Fault
from vltrain.data.records import Record, Unreadable
from vltrain.data.splits import chosen_split

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

MAGIC = b"PAR1"  # a Parquet file's first and last bytes
ENDING = ".parquet"
_READ_BYTES = 1 << 20  # of a column that are fetched at once
_OTHER_DATA = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".arrow")
_ABOUT_DATA = ("dataset_info.json", "dataset_infos.json")  # lie beside the files of some datasets
_SHARD = re.compile(r"(?P<split>\w+(\.\w+)*)-\d{5}-of-\d{5}\.parquet", re.IGNORECASE)


def scan_parquet(path: Path) -> Iterator[Record | Unreadable]:
    """The rows of a Parquet file as records; a row group that is broken is named and passed over.

    Raises:
        OSError: the file cannot be opened.
    """
    opened = _open(path)
    if isinstance(opened, Fault):
        yield Unreadable(path, None, opened)
        return
    first = 0
    with opened:
        for group in range(opened.num_row_groups):
            yield from _scan_group(opened, group, path, first)
            first += opened.metadata.row_group(group).num_rows


def scan_parquet_folder(folder: Path, split: str | None) -> Iterator[Record | Unreadable]:
    """The rows of all Parquet files in a folder and the folders in it, sorted by path.

    Hidden names and those that begin with `_` are left out. Where every file is named as a
    shard of a split (`train-00000-of-00002.parquet`), one split is read.

    Args:
        folder: with Parquet files and no other data.
        split: which to read; None: `train`, or the only one.

    Raises:
        OSError: a file cannot be opened.
    """
    chosen = _shards(folder, split)
    if isinstance(chosen, Fault):
        yield Unreadable(folder, None, chosen)
        return
    for file in chosen:
        yield from scan_parquet(file)


def _open(path: Path) -> "ParquetFile | Fault":
    """A Parquet file, or why it is none."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    with path.open("rb") as file:
        begins = file.read(len(MAGIC))
    if begins != MAGIC:
        message = "the file is empty (0 bytes)" if not begins else "the file is not Parquet"
        fix = "write the file anew, or give it the ending of what it is"
        return Fault("not_parquet", message, fix)
    try:
        # Row groups are read piece by piece: people write gigabytes of pictures into one.
        return ParquetFile(path, buffer_size=_READ_BYTES, pre_buffer=False)
    except (ArrowException, OSError) as error:
        message = f"the Parquet file is cut short or broken ({first_line(error)})"
        return Fault("not_parquet", message, "write the file anew, or bring it down again")


def _scan_group(
    opened: "ParquetFile", group: int, path: Path, first: int
) -> Iterator[Record | Unreadable]:
    """The records of one row group, of which `first` is the number of the first."""
    from pyarrow import ArrowException

    described = opened.metadata.row_group(group)
    rows = batch_rows(described.num_rows, described.total_byte_size)
    # Without threads: a process that is forked while they run may wait for them for ever.
    batches = opened.iter_batches(batch_size=rows, row_groups=[group], use_threads=False)
    index = first
    while True:
        try:
            batch = next(batches, None)
        except (ArrowException, OSError) as error:
            last = first + described.num_rows - 1
            fault = unreadable_rows(f"what follows up to row {last}", error)
            yield Unreadable(path, index, fault)
            return
        if batch is None:
            return
        yield from records_of_batch(batch, path, index)
        index += batch.num_rows


def _shards(folder: Path, split: str | None) -> list[Path] | Fault:
    """The Parquet files of a folder that are to be read, or why it cannot be said which."""
    files = sorted(_visible_files(folder))
    shards = [file for file in files if file.suffix.lower() == ENDING]
    others = [
        file.relative_to(folder)
        for file in files
        if file.suffix.lower() in _OTHER_DATA and file.name not in _ABOUT_DATA
    ]
    if others:
        named = ", ".join(map(str, others[:3])) + (", …" if len(others) > 3 else "")
        message = f"the folder holds data that is not Parquet: {named}"
        return Fault("mixed_folder", message, "name the files themselves, each as a data file")
    if not shards:
        message = "the folder holds no Parquet file, and no dataset was saved to it"
        return Fault("no_parquet", message, "name a data file, or a folder of Parquet files")
    splits = [match["split"] for file in shards if (match := _SHARD.fullmatch(file.name))]
    if len(splits) < len(shards):  # names that tell nothing
        splits = []
    if not splits and split is None:
        return shards
    chosen = chosen_split(sorted(set(splits)), split, str(folder))
    if isinstance(chosen, Fault):
        return chosen
    return [file for file, name in zip(shards, splits, strict=True) if name == chosen]


def _visible_files(folder: Path) -> Iterator[Path]:
    """All files in a folder and the folders in it whose names begin neither with `.` nor `_`."""
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith((".", "_"))]
        yield from (Path(parent, name) for name in names if not name.startswith((".", "_")))
