"""Every finding about data files, with its record, before a model is loaded.

One pass over the records, in as many processes as are asked for. Each record is asked for all
its faults, those of its form (`formats`), its boxes (`grounding`), its pictures (`images`) and
its length (`encoding`). A new check is a function that gives faults, called in
`Checker.examine` or `Checker._content_faults`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from vltrain.data.conversation import Conversation, ImagePart, Turn
from vltrain.data.dataset import TooLong
from vltrain.data.encoding import (
    LabelPolicy,
    Processor,
    Sample,
    encode_conversation,
    too_long_message,
)
from vltrain.data.faults import Fault
from vltrain.data.formats import Format, read_conversation, record_id
from vltrain.data.grounding import read_boxes
from vltrain.data.images import TURNED_PICTURE
from vltrain.data.markup import BOX_TAG, token_faults
from vltrain.data.parallel import map_chunks
from vltrain.data.pictures import LOCAL_PICTURES, Pictures, source_key
from vltrain.data.records import Record, Unreadable
from vltrain.data.sources import scan_records

Severity = Literal["error", "warning"]
MOST_PICTURES_SEEN = 50_000  # remembered by a checker: about 300 bytes each


@dataclass(frozen=True)
class Finding:
    """A fault and its place. An error stops a run before it starts, a warning does not."""

    file: str
    record: int | None  # a list's index or a JSONL file's line, from 0; None: about the file
    id: str | None
    severity: Severity
    kind: str
    message: str
    fix: str


@dataclass(frozen=True)
class Report:
    """What a check of files found."""

    records: int  # read, faulty ones included
    findings: tuple[Finding, ...]
    dropped: int = 0  # longer than max_length, left out by too_long="drop"

    @property
    def errors(self) -> tuple[Finding, ...]:
        """The findings that stop a run."""
        return tuple(found for found in self.findings if found.severity == "error")

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """The findings that do not."""
        return tuple(found for found in self.findings if found.severity == "warning")

    def as_json(self) -> dict[str, Any]:
        """The form that other programs read: `records` and `findings`."""
        return {"records": self.records, "findings": [asdict(found) for found in self.findings]}


@dataclass(frozen=True)
class Examined:
    """What one look at a record gives, for all who need it."""

    findings: tuple[Finding, ...]
    conversation: Conversation | None = None  # None: a reader stops at one of the findings
    sample: Sample | None = None  # None: no conversation, or no processor to encode it


@dataclass
class Checker:
    """What the records of a run are held against, and the pictures it has seen."""

    processor: Processor | None = None  # encodes; None: lengths are not checked
    pictures: Pictures = LOCAL_PICTURES
    max_length: int | None = None  # tokens, image tokens included
    too_long: TooLong = "error"
    labels: LabelPolicy = "assistant"
    decode: bool = False  # pictures are decoded whole; False: their headers and ends are read
    format: Format = "auto"
    seen: dict[tuple[Path, str], list[Fault]] = field(default_factory=dict)  # pictures' faults

    def check_chunk(self, entries: Sequence[Record | Unreadable]) -> tuple[int, list[Finding]]:
        """How many records there are among some entries, and all that is wrong with them."""
        count = sum(isinstance(entry, Record) or entry.index is not None for entry in entries)
        return count, [found for entry in entries for found in self.examine(entry).findings]

    def examine(self, entry: Record | Unreadable) -> Examined:
        """Read, look through and encode one record; or say why a place holds none."""
        if isinstance(entry, Unreadable):
            return Examined((self._finding(entry, None, entry.fault),))
        conversation, faults = read_conversation(
            entry.value, format=self.format, image_size=self.pictures.measure(entry.file)
        )
        readable = not any(map(self._refuses, faults))
        faults += self._content_faults(conversation, entry)
        sample = None
        if readable and self.processor is not None:
            sample = encode_conversation(conversation, self.processor, self.labels)
            faults += self._length_faults(sample, self.processor)
        identity = record_id(entry.value)
        findings = tuple(self._finding(entry, identity, fault) for fault in faults)
        return Examined(findings, conversation if readable else None, sample)

    def _refuses(self, fault: Fault) -> bool:
        return fault.refused(lenient=self.labels == "reference")

    def _finding(self, entry: Record | Unreadable, identity: str | None, fault: Fault) -> Finding:
        return Finding(
            file=str(entry.file),
            record=entry.index,
            id=identity,
            severity="error" if self._refuses(fault) else "warning",
            kind=fault.kind,
            message=fault.message,
            fix=fault.fix,
        )

    def _content_faults(self, conversation: Conversation, record: Record) -> Iterator[Fault]:
        """What is wrong inside the turns that could be read."""
        has_boxes = any(BOX_TAG.search(turn.text) for turn in conversation.turns)
        for turn in conversation.turns:
            yield from _empty_turn_faults(turn)
            yield from _box_faults(turn)
            yield from token_faults(turn)
            for fault in self._picture_faults(turn, record):
                if has_boxes or fault.kind != TURNED_PICTURE:
                    yield fault

    def _picture_faults(self, turn: Turn, record: Record) -> Iterator[Fault]:
        """What is wrong with a turn's pictures; each is looked at once, as far as is remembered."""
        sources = [part.source for part in turn.parts if isinstance(part, ImagePart)]
        for source in filter(None, sources):  # an empty path is a fault of the form
            key = (record.file, source_key(source))
            if key not in self.seen:
                if len(self.seen) >= MOST_PICTURES_SEEN:
                    del self.seen[next(iter(self.seen))]  # the oldest
                self.seen[key] = self.pictures.faults(source, record.file, decode=self.decode)
            yield from self.seen[key]

    def _length_faults(self, sample: Sample, processor: Processor) -> Iterator[Fault]:
        """The fault of a sample longer than max_length: a warning where it is dropped."""
        length = len(sample.input_ids)
        if self.max_length is None or length <= self.max_length:
            return
        message = too_long_message(sample, processor, self.max_length)
        if self.too_long == "drop":
            message += ": the record is dropped"
            fix = f"raise data.max_length to {length} or more to keep it"
            yield Fault("too_long", message, fix, "warning")
        else:
            fix = f"raise data.max_length to {length} or more, or set data.too_long: drop"
            yield Fault("too_long", message, fix)


def check_files(
    files: Sequence[Path],
    *,
    processor: Processor | None = None,
    pictures: Pictures = LOCAL_PICTURES,
    max_length: int | None = None,
    too_long: TooLong = "error",
    labels: LabelPolicy = "assistant",
    decode: bool = False,
    format: Format = "auto",
    workers: int = 1,
    on_checked: Callable[[int], None] | None = None,
) -> Report:
    """Read files once and report all that would stop or spoil a training run.

    Args:
        files: JSON lists or JSONL files.
        processor: counts tokens; without it lengths are not checked.
        pictures: where pictures are looked up.
        max_length: tokens, image tokens included; None: any length.
        too_long: are longer samples errors, or dropped and counted?
        labels: under "reference", what the original code takes is a warning and no error.
        decode: decode pictures whole, which finds damage in their middle; False: read their
            headers, and see by their ends whether they were cut short.
        format: how records are read; "auto" tells by the content of each.
        workers: processes that check; the report is the same for any number.
        on_checked: told, now and then, how many more records have been checked.

    Returns:
        The findings in the order of the files and records. Never raises for faulty data.
    """
    checker = Checker(processor, pictures, max_length, too_long, labels, decode, format)
    records = 0
    findings: list[Finding] = []
    for count, found in map_chunks(checker.check_chunk, _entries(files), workers=workers):
        records += count
        findings.extend(found)
        if on_checked:
            on_checked(count)
    dropped = sum(found.kind == "too_long" and found.severity == "warning" for found in findings)
    return Report(records, tuple(findings), dropped)


def _entries(files: Iterable[Path]) -> Iterator[Record | Unreadable]:
    for file in files:
        yield from scan_records(file)


def _empty_turn_faults(turn: Turn) -> Iterator[Fault]:
    """A question or an answer without a word or picture: readable, but it teaches silence."""
    if turn.role != "system" and not turn.parts:
        message = f"{turn.name} is empty"
        fix = "write what is said, or remove the question with its answer"
        yield Fault("empty_turn", message, fix, "strict")


def _box_faults(turn: Turn) -> Iterator[Fault]:
    """What is wrong with the boxes of a turn."""
    _, faults = read_boxes(turn.text)
    for fault in faults:
        message = f"{turn.name}: {fault.message}"
        yield Fault(fault.kind, message, fault.fix, fault.grade)
