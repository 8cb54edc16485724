"""JSON lists and JSONL files -> records, and the places that hold none."""

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from vltrain.data.faults import Fault
from vltrain.data.json_list import NotJsonError, list_elements
from vltrain.data.records import Record, Unreadable

_WIDE = Fault("not_utf8", "the file is UTF-16 or UTF-32, not UTF-8", "save the file as UTF-8")


def scan_list(path: Path) -> Iterator[Record | Unreadable]:
    """The elements of a JSON list, read piece by piece."""
    with path.open("rb") as file:
        begins = _first_bytes(file)
        if _is_wide(file):
            yield Unreadable(path, None, _WIDE)
            return
        if begins.startswith(b"["):
            try:
                for index, value in enumerate(list_elements(file)):
                    yield Record(path, index, value)
            except NotJsonError as error:
                yield Unreadable(path, None, error.fault)
        elif begins:
            yield Unreadable(path, None, _no_list(file.read().removeprefix(codecs.BOM_UTF8)))


def _first_bytes(file: BinaryIO) -> bytes:
    """What a file begins with, a byte order mark and blanks left out; empty if all is blank."""
    begins = file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
    while not begins and (more := file.read(4096)):
        begins = more.lstrip()
    return begins


def _is_wide(file: BinaryIO) -> bool:
    """Does a file begin as UTF-16 or UTF-32 does, with or without a mark? Goes to its start."""
    file.seek(0)
    begins = file.read(4)
    file.seek(0)
    return begins[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) or b"\0" in begins


def _no_list(raw: bytes) -> Fault:
    """Why a file that does not begin with `[` is no list of records."""
    parsed = _parse(raw)
    if isinstance(parsed, Fault):
        return _lines_as_list(raw) or parsed
    message = "the file is not a list of records"
    fix = "put the records between [ and ], or write one per line into a .jsonl file"
    return Fault("not_a_list", message, fix)


def scan_lines(path: Path) -> Iterator[Record | Unreadable]:
    """The lines of a JSONL file, empty ones skipped but counted."""
    first = True
    with path.open("rb") as file:
        if _is_wide(file):
            yield Unreadable(path, None, _WIDE)
            return
        for index, line in enumerate(file):
            raw = line.removeprefix(codecs.BOM_UTF8) if index == 0 else line
            if not raw.strip():
                continue
            if first and raw.lstrip().startswith(b"["):
                message = "the file is a JSON list, not one record per line"
                fix = f"name it {path.stem}.json"
                yield Unreadable(path, None, Fault("list_as_lines", message, fix))
                return
            first = False
            parsed = _parse(raw.rstrip(b"\r\n"), line=index + 1)
            if isinstance(parsed, Fault):
                yield Unreadable(path, index, parsed)
            else:
                yield Record(path, index, parsed.value)


@dataclass(frozen=True)
class _Parsed:
    """What some JSON holds; any value, None included."""

    value: Any


def _parse(raw: bytes, line: int = 1) -> _Parsed | Fault:
    """Read JSON.

    Args:
        raw: the text, UTF-8.
        line: of the file, where it begins; from 1, as editors count.
    """
    try:
        return _Parsed(json.loads(raw.decode("utf-8")))
    except UnicodeDecodeError as error:
        place = line + raw[: error.start].count(b"\n")
        return Fault("not_utf8", f"line {place} is not UTF-8", "save the file as UTF-8")
    except json.JSONDecodeError as error:
        place = line + error.lineno - 1
        message = f"not JSON: line {place}, column {error.colno}: {error.msg}"
        return Fault("not_json", message, f"mend line {place}")
    except (ValueError, RecursionError) as error:  # a number or a nesting beyond all measure
        return Fault("not_json", f"not JSON: line {line}: {error}", f"mend line {line}")


def _lines_as_list(raw: bytes) -> Fault | None:
    """The fault of a `.json` file that holds one record per line, if it does."""
    lines = [line for line in raw.split(b"\n") if line.strip()]
    if len(lines) < 2:
        return None
    first = _parse(lines[0])
    if isinstance(first, Fault) or not isinstance(first.value, dict):
        return None
    message = "the file holds one JSON record per line, not a JSON list"
    return Fault("lines_as_list", message, "give it the ending .jsonl")
