"""Data files, folders and names -> records, one after the other.

| what is there | is read as |
| --- | --- |
| a file that ends in `.jsonl` or `.ndjson` | a record a line |
| a file that ends in `.parquet`, or begins as Parquet does | a record a row |
| any other file | a JSON list |
| a folder that `save_to_disk` wrote | a dataset, or one split of several |
| any other folder | the Parquet files in it |
| nothing, and the name can be one on the hub | the dataset of that name |

`:split` behind a folder or a name says which split is read.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

from vltrain.data.faults import Fault, error_of
from vltrain.data.hub_datasets import files_of_hub_dataset, hub_dataset, scan_hub_dataset
from vltrain.data.json_files import scan_lines, scan_list
from vltrain.data.parquet_files import ENDING as PARQUET
from vltrain.data.parquet_files import MAGIC, scan_parquet, scan_parquet_folder
from vltrain.data.records import Record, Unreadable
from vltrain.data.saved_datasets import is_saved_dataset, scan_saved_dataset
from vltrain.errors import VltrainError

_LINES = (".jsonl", ".ndjson")


def read_records(path: Path) -> list[Record]:
    """All records of what `path` names.

    Raises:
        VltrainError: it cannot be read; every place that cannot is named.
    """
    records: list[Record] = []
    unreadable: list[Unreadable] = []
    for entry in scan_records(path):
        if isinstance(entry, Record):
            records.append(entry)
        else:
            unreadable.append(entry)
    if unreadable:
        raise VltrainError("\n".join(str(error_of([bad.fault], bad.name)) for bad in unreadable))
    return records


def scan_records(path: Path) -> Iterator[Record | Unreadable]:
    """The records of what `path` names, one after the other, and the places that hold none."""
    path = Path(path)
    empty = True
    try:
        for entry in _entries(path):
            empty = False
            yield entry
    except OSError as error:
        message = f"{path} cannot be read ({error.strerror or error})"
        yield Unreadable(path, None, Fault("unreadable_file", message, "mend the path"))
        return
    if empty:
        fault = Fault("no_records", "the file holds no record", "add records, or leave it out")
        yield Unreadable(path, None, fault)


def scan_all(paths: Iterable[Path], most: int | None = None) -> Iterator[Record | Unreadable]:
    """The records of all that `paths` name; each knows the place of the path that it is from.

    Args:
        paths: files, folders or names.
        most: records that are read of each path; None: all.
    """
    for source, path in enumerate(paths):
        for entry in islice(scan_records(path), most):
            yield replace(entry, source=source) if isinstance(entry, Record) and source else entry


def files_of(path: Path) -> Iterable[Path]:
    """The files on disk that hold what `path` names; none where nothing is there."""
    folder = path if path.is_dir() else Path(str(path).rpartition(":")[0])
    if not path.exists() and not folder.is_dir():
        named = hub_dataset(path.as_posix())
        return [] if named is None else files_of_hub_dataset(named)
    return [path] if path.is_file() else sorted(folder.rglob("*"))


def _entries(path: Path) -> Iterator[Record | Unreadable]:
    """The records of a file, a folder or a dataset, told by what is there."""
    if path.is_dir():
        return _scan_folder(path, None, path)
    if not path.exists():
        folder, _, split = str(path).rpartition(":")
        if folder and split and Path(folder).is_dir():
            return _scan_folder(Path(folder), split, path)
        named = hub_dataset(path.as_posix())
        if named is not None:
            return scan_hub_dataset(named, path)
    if path.suffix.lower() in _LINES:
        return scan_lines(path)
    if path.suffix.lower() == PARQUET or _begins_as_parquet(path):
        return scan_parquet(path)
    return scan_list(path)


def _scan_folder(folder: Path, split: str | None, named: Path) -> Iterator[Record | Unreadable]:
    """The records of a folder, which its user named with or without a split."""
    if is_saved_dataset(folder):
        return scan_saved_dataset(folder, split, named)
    return scan_parquet_folder(folder, split)


def _begins_as_parquet(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC
