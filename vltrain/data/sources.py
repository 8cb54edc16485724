"""Data files -> records, one after the other."""

from collections.abc import Iterator
from pathlib import Path

from vltrain.data.faults import Fault, error_of
from vltrain.data.json_files import scan_lines, scan_list
from vltrain.data.records import Record, Unreadable
from vltrain.errors import VltrainError

_LINES = (".jsonl", ".ndjson")


def read_records(path: Path) -> list[Record]:
    """All records of a JSON list (`.json`) or a JSONL file (`.jsonl`), UTF-8.

    Raises:
        VltrainError: the file cannot be read; every line that cannot is named.
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
    """The records of a file, one after the other, and the places that hold none."""
    path = Path(path)
    scan = scan_lines if path.suffix.lower() in _LINES else scan_list
    empty = True
    try:
        for entry in scan(path):
            empty = False
            yield entry
    except OSError as error:
        message = f"{path} cannot be read ({error.strerror or error})"
        yield Unreadable(path, None, Fault("unreadable_file", message, "mend the path"))
        return
    if empty:
        fault = Fault("no_records", "the file holds no record", "add records, or leave it out")
        yield Unreadable(path, None, fault)
