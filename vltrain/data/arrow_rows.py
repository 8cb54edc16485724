"""Rows of Arrow tables -> records, as a line of JSONL would have them.

A table has every column and every field of a struct in every row; what is null in a row is left
out of its record. Pictures that a table holds as bytes become objects with a `data:` URI as their
path: wherever text is meant, they are a fault.
"""

import base64
import json
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vltrain.data.faults import Fault
from vltrain.data.records import Record, Unreadable

if TYPE_CHECKING:
    from pyarrow import RecordBatch

BATCH_BYTES = 8 << 20  # of a table's rows that are in memory at once, about
MOST_BATCH_ROWS = 1000
_TURN_COLUMNS = ("conversations", "messages")
_JSON_COLUMNS = (*_TURN_COLUMNS, "history", "objects")  # lists and objects that may be JSON text
_PICTURE_STARTS = (
    (b"\x89PNG\r\n", "image/png"),
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"GIF8", "image/gif"),
    (b"II*\0", "image/tiff"),
    (b"MM\0*", "image/tiff"),
)
_ANY_BYTES = "application/octet-stream"


def batch_rows(rows: int, total_bytes: int) -> int:
    """How many rows of a table to read at once."""
    return max(1, min(MOST_BATCH_ROWS, BATCH_BYTES * rows // max(1, total_bytes)))


def records_of_batch(batch: "RecordBatch", file: Path, first: int) -> Iterator[Record | Unreadable]:
    """The rows of a batch as records, and those that Python has no values for.

    Args:
        batch: rows that follow each other.
        file: what the records say they are from.
        first: the number of the first row.
    """
    held_bytes = batch.nbytes // max(1, batch.num_rows)
    for index, row in enumerate(_rows(batch), start=first):
        if isinstance(row, Fault):
            yield Unreadable(file, index, row)
        else:
            yield Record(file, index, record_of_row(row), held_bytes)


def _rows(batch: "RecordBatch") -> Iterator[dict[str, Any] | Fault]:
    """The rows of a batch, each with a fault in its place where Python has no value for it."""
    try:
        yield from batch.to_pylist()
    except _unreadable() as error:
        if batch.num_rows == 1:
            yield unreadable_rows("the row", error)
            return
        for place in range(batch.num_rows):
            yield from _rows(batch.slice(place, 1))


def _unreadable() -> tuple[type[Exception], ...]:
    """What pyarrow raises for text that is not UTF-8, dates beyond the year 9999 and the like."""
    from pyarrow import ArrowException

    return ArrowException, ValueError, OverflowError


def unreadable_rows(what: str, error: Exception) -> Fault:
    """Why rows of a table are not there."""
    message = f"{what} cannot be read ({first_line(error)})"
    return Fault("unreadable_row", message, "write the data anew, or bring it down again")


def first_line(error: BaseException) -> str:
    """What an error says first; its kind where it says nothing."""
    said = str(error).strip().splitlines()
    return said[0] if said else type(error).__name__


def record_of_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row as a record of plain JSON values.

    Turns that are JSON text, or a struct of lists as `datasets` stores a sequence of structs,
    become the list that they stand for.
    """
    record = _without_nulls(row)
    for key in _JSON_COLUMNS:
        if isinstance(record.get(key), str):
            record[key] = _parsed(record[key])
    for key in _TURN_COLUMNS:
        if isinstance(record.get(key), dict):
            record[key] = _turned(record[key])
    return record


def data_uri(content: bytes) -> str:
    """Bytes as a `data:` URI, with the type of picture that they begin like."""
    media_type = _picture_type(content) or _ANY_BYTES
    return f"data:{media_type};base64,{base64.b64encode(content).decode('ascii')}"


def _without_nulls(fields: dict[Any, Any]) -> dict[str, Any]:
    plain = {str(key): _plain(value) for key, value in fields.items()}
    return {key: value for key, value in plain.items() if value is not None}


def _plain(value: Any) -> Any:
    """A value as JSON has it; null where a picture has neither bytes nor a path."""
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, bytes):
        return _text_or_picture(value)
    if isinstance(value, dict):
        if "bytes" in value and value.keys() <= {"bytes", "path"}:
            return _picture(value)
        return _without_nulls(value)
    if isinstance(value, list):
        if value and all(isinstance(entry, tuple) for entry in value):  # how a map is given
            return _without_nulls({str(key): entry for key, entry in value})
        return [_plain(entry) for entry in value]
    if isinstance(value, Decimal) and value.is_finite():
        return int(value) if value == value.to_integral_value() else float(value)
    if hasattr(value, "tolist"):  # arrays and scalars of numpy
        return _plain(value.tolist())
    return str(value)  # dates, times, durations, UUIDs


def _picture(value: dict[str, Any]) -> dict[str, Any] | None:
    """A picture from the struct that `datasets` stores one in; None where it is empty."""
    content = value["bytes"]
    path = data_uri(content) if isinstance(content, bytes) else _plain(value.get("path"))
    return None if path is None else {"path": path}


def _text_or_picture(content: bytes) -> str | dict[str, Any]:
    """Bytes outside a picture's struct: text that was not marked as such, or a picture."""
    if _picture_type(content) is None:
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError:
            pass
    return {"path": data_uri(content)}


def _picture_type(content: bytes) -> str | None:
    """The media type of the picture that some bytes begin like; None: like no picture."""
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "image/webp"
    if content[:2] == b"BM" and content[6:10] == bytes(4):
        return "image/bmp"
    return next((kind for start, kind in _PICTURE_STARTS if content.startswith(start)), None)


def _parsed(text: str) -> Any:
    """The list or object that a text holds as JSON; the text itself where it holds none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, list | dict) else text


def _turned(columns: dict[str, Any]) -> Any:
    """A struct of lists of one length as a list of objects; anything else as it is."""
    lists = list(columns.values())
    if not lists or not all(isinstance(entries, list) for entries in lists):
        return columns
    if len({len(entries) for entries in lists}) != 1:
        return columns
    return [
        _without_nulls(dict(zip(columns, entries, strict=True)))
        for entries in zip(*lists, strict=True)
    ]
