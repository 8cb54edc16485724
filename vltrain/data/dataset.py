"""Files -> records -> samples with their pictures.

A record is one element of a JSON list or one line of a JSONL file; its number counts from 0 and
names it in every error: `train.json#17`.
"""

import codecs
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal

from vltrain.data.encoding import LabelPolicy, Processor, Sample, encode, too_long_error
from vltrain.data.faults import Fault, error_of
from vltrain.data.formats import Format
from vltrain.data.images import image_size, open_image, resolve_image
from vltrain.data.json_list import NotJsonError, list_elements
from vltrain.data.swift import ImageSize
from vltrain.errors import VltrainError

TooLong = Literal["error", "drop"]
_LINES = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class Record:
    """One element of a data file, as its JSON has it."""

    file: Path
    index: int  # in the list, or the line of a JSONL file; from 0
    value: Any

    @property
    def name(self) -> str:
        """What errors call it."""
        return f"{self.file.name}#{self.index}"

    def image_size(self, image_root: Path | None) -> ImageSize:
        """What measures the record's pictures, for boxes that are written in pixels."""
        return partial(image_size, data_file=self.file, image_root=image_root)


@dataclass(frozen=True)
class Unreadable:
    """A place of a file where no record could be read."""

    file: Path
    index: int | None  # None: the fault is the file's
    fault: Fault

    @property
    def name(self) -> str:
        """What errors call it."""
        return self.file.name if self.index is None else f"{self.file.name}#{self.index}"


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
    scan = _scan_lines if path.suffix.lower() in _LINES else _scan_list
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


def split_records(
    records: Sequence[Record], share: float, seed: int
) -> tuple[list[Record], list[Record]]:
    """Records to learn from and records to evaluate on, each in their old order.

    Args:
        records: at least two of them, unless `share` is 0.
        share: of the records that are held out, in [0, 1); at least one where it is not 0.
        seed: decides which; the same seed gives the same split.

    Raises:
        VltrainError: nothing would be left to learn from.
    """
    held_out = 0 if share == 0 else max(1, round(share * len(records)))
    if not 0 <= share < 1 or held_out >= max(1, len(records)):
        what = f"{share} of {len(records)} records leaves none to learn from"
        raise VltrainError.at("data.eval_share", what=what, fix="set a share such as 0.05, or 0")
    chosen = set(random.Random(seed).sample(range(len(records)), held_out))
    train = [record for place, record in enumerate(records) if place not in chosen]
    return train, [records[place] for place in sorted(chosen)]


class SampleDataset:
    """Samples with their pixels, by number: a map-style dataset for a DataLoader.

    All records are encoded once when it is made (no picture is decoded), so that faults are
    found and lengths known before a run starts. `ds[i]` opens and preprocesses the pictures,
    in the worker that asks for it.
    """

    def __init__(
        self,
        records: Sequence[Record],
        processor: Processor,
        *,
        labels: LabelPolicy = "assistant",
        max_length: int | None = None,
        too_long: TooLong = "error",
        image_root: Path | None = None,
        format: Format = "auto",
    ) -> None:
        """Encode the records and keep those that fit.

        Args:
            records: of one or several files.
            processor: the model's side of it.
            labels: what is learned, as in `encode`.
            max_length: tokens, image tokens included; None: any length.
            too_long: refuse longer samples, or drop and count them.
            image_root: where relative picture paths are looked up first.
            format: how records are read; "auto" tells by the content of each.

        Raises:
            VltrainError: faulty or too long records, all of them in one message.
        """
        self.processor = processor
        self.labels = labels
        self.image_root = image_root
        self.format: Format = format
        self.records: list[Record] = []
        self.lengths: list[int] = []  # tokens of each sample, image tokens included
        self.learned_tokens: list[int] = []  # of each sample
        self.image_counts: list[int] = []  # of each sample
        self.largest_ids: list[int] = []  # of each sample
        self.dropped = 0  # records longer than max_length that were left out
        errors: list[str] = []
        for record in records:
            try:
                sample = self._encode(record)
            except VltrainError as error:
                errors.append(str(error))
                continue
            if max_length is None or len(sample.input_ids) <= max_length:
                self._keep(record, sample)
            elif too_long == "drop":
                self.dropped += 1
            else:
                errors.append(str(too_long_error(sample, processor, max_length, record.name)))
        if errors:
            raise VltrainError("\n".join(errors))

    def _keep(self, record: Record, sample: Sample) -> None:
        self.records.append(record)
        self.lengths.append(len(sample.input_ids))
        self.learned_tokens.append(sample.learned_tokens)
        self.image_counts.append(len(sample.images))
        self.largest_ids.append(max(sample.input_ids))

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """One sample.

        Returns:
            `input_ids`, `labels` (lists of int), `record` (its name) and, where it has pictures,
            `pixel_values`: float [pictures, 3, S, S].

        Raises:
            VltrainError: a picture is missing or broken; names the record and the path.
        """
        record = self.records[number]
        sample = self._encode(record)
        item: dict[str, Any] = {
            "input_ids": sample.input_ids,
            "labels": sample.labels,
            "record": record.name,
        }
        if sample.images:
            pictures = [self._open(source, record) for source in sample.images]
            processed = self.processor.image_processor(images=pictures, return_tensors="pt")
            item["pixel_values"] = processed["pixel_values"]
        return item

    def _encode(self, record: Record) -> Sample:
        return encode(
            record.value,
            self.processor,
            self.labels,
            where=record.name,
            format=self.format,
            image_size=record.image_size(self.image_root),
        )

    def _open(self, source: str, record: Record) -> Any:
        path = resolve_image(
            source, data_file=record.file, image_root=self.image_root, where=record.name
        )
        return open_image(path, where=record.name)


def _scan_list(path: Path) -> Iterator[Record | Unreadable]:
    """The elements of a JSON list, read piece by piece."""
    with path.open("rb") as file:
        begins = _first_bytes(file)
        file.seek(0)
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


def _no_list(raw: bytes) -> Fault:
    """Why a file that does not begin with `[` is no list of records."""
    parsed = _parse(raw)
    if isinstance(parsed, Fault):
        return _lines_as_list(raw) or parsed
    message = "the file is not a list of records"
    fix = "put the records between [ and ], or write one per line into a .jsonl file"
    return Fault("not_a_list", message, fix)


def _scan_lines(path: Path) -> Iterator[Record | Unreadable]:
    """The lines of a JSONL file, empty ones skipped but counted."""
    first = True
    with path.open("rb") as file:
        if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            fault = Fault("not_utf8", "the file is UTF-16, not UTF-8", "save the file as UTF-8")
            yield Unreadable(path, None, fault)
            return
        file.seek(0)
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
