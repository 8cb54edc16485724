"""Every finding about data files, with its record, before a model is loaded.

One pass over the records, in as many processes as are asked for. Each record is asked for all
its faults, those of its form (`formats`), its boxes (`grounding`), its pictures (`images`) and
its length (`encoding`); then the records are held against each other (`survey`). A new check is
a function that gives faults, called in `Checker.examine` or `_look_through`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

from vltrain.data.conversation import Conversation, ImagePart, Turn
from vltrain.data.encoding import (
    LabelPolicy,
    Processor,
    Sample,
    TooLong,
    encode_conversation,
    too_long_message,
)
from vltrain.data.faults import Fault
from vltrain.data.findings import Finding, Report
from vltrain.data.formats import Format, read_conversation
from vltrain.data.grounding import Region, read_regions
from vltrain.data.images import TURNED_PICTURE, Look
from vltrain.data.markup import BOX_TAG, token_faults
from vltrain.data.parallel import map_chunks
from vltrain.data.pictures import (
    BAD_PICTURE_KINDS,
    LOCAL_PICTURES,
    BadPictures,
    Pictures,
    source_key,
)
from vltrain.data.records import Record, Unreadable
from vltrain.data.sources import scan_all
from vltrain.data.survey import Survey
from vltrain.data.tallies import (
    FOUND_TOO_LONG,
    FileTally,
    Traits,
    characters,
    content_of,
    learned_answers,
    spots_of,
)

MOST_PICTURES_SEEN = 50_000  # remembered by a checker: about 500 bytes each


@dataclass(frozen=True)
class Examined:
    """What one look at a record gives, for all who need it."""

    findings: tuple[Finding, ...]
    sources: tuple[str, ...] = ()  # of its pictures
    conversation: Conversation | None = None  # None: a reader stops at one of the findings
    sample: Sample | None = None  # None: no conversation, or no processor to encode it
    traits: Traits | None = None  # to compare it with other records; None: no conversation

    @property
    def kept(self) -> bool:
        """Whether a run learns from the record: nothing stops it or leaves it out."""
        in_the_way = any(found.severity == "error" or found.drops for found in self.findings)
        return self.sample is not None and not in_the_way


@dataclass(frozen=True)
class Keeper:
    """What holds on to records while they are checked."""

    gather: Callable[[Sequence[tuple[Record, Examined]]], Any]  # in the workers; can be pickled
    store: Callable[[Any], None]  # gets what `gather` gives, in the order of the records


@dataclass(frozen=True)
class Checked:
    """What a look at some records that follow each other gives."""

    records: int
    findings: list[Finding]
    tallies: list[FileTally]
    gathered: Any  # what a keeper holds on to; None without one


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
    bad_pictures: BadPictures = "error"
    seen: dict[tuple[Path, str], Look] = field(default_factory=dict)  # by file and source

    def check_chunk(
        self,
        entries: Sequence[Record | Unreadable],
        gather: Callable[[Sequence[tuple[Record, Examined]]], Any] | None = None,
    ) -> Checked:
        """All that is wrong with some entries, what is kept of them for a survey, and what
        `gather` makes of the records."""
        count = 0
        records: list[tuple[Record, Examined]] = []
        findings: list[Finding] = []
        survey = Survey()
        self._fetch(entry for entry in entries if isinstance(entry, Record))
        for entry in entries:
            examined = self.examine(entry)
            findings += examined.findings
            count += isinstance(entry, Record) or entry.index is not None
            if isinstance(entry, Record):
                survey.count(entry.file, examined.traits)
                if gather:
                    records.append((entry, examined))
        return Checked(count, findings, survey.tallies, gather(records) if gather else None)

    def _fetch(self, records: Iterable[Record]) -> None:
        """Download what records show before they are looked at one by one, where that is allowed.

        What fails is remembered, or it would be tried again for each record that shows it.
        """
        if self.pictures.downloads is None:
            return
        shown = {
            (record.file, source)
            for record in records
            for source in read_conversation(record.value, format=self.format)[0].image_sources
        }
        faults = self.pictures.fetch_all(source for _, source in shown)
        for file, source in shown:
            if source in faults:
                self._remember((file, source_key(source)), Look((faults[source],)))

    def examine(self, entry: Record | Unreadable) -> Examined:
        """Read, look through and encode one record; or say why a place holds none."""
        if isinstance(entry, Unreadable):
            return Examined((self._finding(entry, None, entry.fault),))
        conversation, faults = self._read(entry)
        readable = not any(map(self._refuses, faults))
        kinds = {fault.kind for fault in faults}
        # An empty path is a fault of the form.
        sources = tuple(filter(None, conversation.image_sources))
        looks = {source: self._look(source, entry.file) for source in sources}
        regions, found = _look_through(conversation, looks)
        silence_known = kinds & {"nothing_to_learn", "bad_part"}  # what made a turn empty
        faults += [new for new in found if not (silence_known and new.kind == "empty_turn")]
        sample = None
        too_long: list[Fault] = []
        if readable and self.processor is not None:
            sample = encode_conversation(conversation, self.processor, self.labels)
            too_long = list(self._length_faults(sample, self.processor))
        faults += too_long
        findings = tuple([self._finding(entry, conversation.id, fault) for fault in faults])
        if not readable:
            return Examined(findings, sources)
        length = len(sample.input_ids) if sample else characters(conversation)
        traits = Traits(
            content_of(conversation, {key: look.path for key, look in looks.items()}, kinds),
            FOUND_TOO_LONG if too_long else length,
            learned_answers(conversation),
            spots_of(regions, _largest(looks)),
        )
        return Examined(findings, sources, conversation, sample, traits)

    def read(self, record: Record) -> Conversation | None:
        """A record's conversation; None where a reader stops."""
        conversation, faults = self._read(record)
        return None if any(map(self._refuses, faults)) else conversation

    def _read(self, record: Record) -> tuple[Conversation, list[Fault]]:
        measure = self.pictures.measure(record.file)
        return read_conversation(record.value, format=self.format, image_size=measure)

    def _refuses(self, fault: Fault) -> bool:
        return fault.refused(lenient=self.labels == "reference")

    def _finding(self, entry: Record | Unreadable, identity: str | None, fault: Fault) -> Finding:
        dropped = self.bad_pictures == "drop" and fault.kind in BAD_PICTURE_KINDS
        return Finding(
            file=str(entry.file),
            record=entry.index,
            id=identity,
            severity="error" if self._refuses(fault) and not dropped else "warning",
            kind=fault.kind,
            message=f"{fault.message}: the record is dropped" if dropped else fault.message,
            fix=fault.fix,
        )

    def _look(self, source: str, file: Path) -> Look:
        """What a picture is like; each is looked at once, as far as is remembered."""
        key = (file, source_key(source))
        if key not in self.seen:
            self._remember(key, self.pictures.look(source, file, decode=self.decode))
        return self.seen[key]

    def _remember(self, key: tuple[Path, str], look: Look) -> None:
        if len(self.seen) >= MOST_PICTURES_SEEN:
            del self.seen[next(iter(self.seen))]  # the oldest
        self.seen[key] = look

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
    bad_pictures: BadPictures = "error",
    workers: int = 1,
    on_checked: Callable[[int], None] | None = None,
    keeper: Keeper | None = None,
    most: int | None = None,
) -> Report:
    """Read files once and report all that would stop or spoil a training run.

    Args:
        files: data files, folders or names, as `sources.scan_records` takes them.
        processor: counts tokens; without it lengths are not checked.
        pictures: where pictures are looked up.
        max_length: tokens, image tokens included; None: any length.
        too_long: are longer samples errors, or dropped and counted?
        labels: under "reference", what the original code takes is a warning and no error.
        decode: decode pictures whole, which finds damage in their middle; False: read their
            headers, and see by their ends whether they were cut short.
        format: how records are read; "auto" tells by the content of each.
        bad_pictures: are missing and broken pictures errors, or are their records dropped and
            counted?
        workers: processes that check; the report is the same for any number.
        on_checked: told, now and then, how many more records have been checked.
        keeper: holds on to what the records are read and encoded to.
        most: records that are looked at in each file; None: all.

    Returns:
        The findings in the order of the files and records, then those about a set as a whole.
        Never raises for faulty data.
    """
    checker = Checker(
        processor, pictures, max_length, too_long, labels, decode, format, bad_pictures
    )
    records = 0
    findings: list[Finding] = []
    survey = Survey("characters" if processor is None else "tokens")
    check = partial(checker.check_chunk, gather=keeper.gather if keeper else None)
    chunks = map_chunks(
        check, scan_all(files, most), workers=workers, size_of=attrgetter("held_bytes")
    )
    for checked in chunks:
        records += checked.records
        findings += checked.findings
        survey.add(checked.tallies)
        if keeper:
            keeper.store(checked.gathered)
        if on_checked:
            on_checked(checked.records)
    dropped = {(found.file, found.record) for found in findings if found.drops}
    findings += survey.findings(partial(scan_all, files, most), checker.read)
    return Report(records, tuple(findings), len(dropped))


def _look_through(
    conversation: Conversation, looks: dict[str, Look]
) -> tuple[list[Region], list[Fault]]:
    """The regions of the turns that could be read, and what is wrong inside those turns."""
    boxed = {turn.position for turn in conversation.turns if BOX_TAG.search(turn.text)}
    picture = _largest(looks) if boxed else None
    regions: list[Region] = []
    faults: list[Fault] = []
    for turn in conversation.turns:
        faults += _empty_turn_faults(turn)
        if turn.position in boxed:
            found, bad_boxes = read_regions(turn.text, picture)
            regions += found
            faults += [replace(bad, message=f"{turn.name}: {bad.message}") for bad in bad_boxes]
        faults += token_faults(turn)
        for fault in _picture_faults(turn, looks):
            if boxed or fault.kind != TURNED_PICTURE:
                faults.append(fault)
    return regions, faults


def _largest(looks: dict[str, Look]) -> tuple[int, int] | None:
    """The width and the height that no picture of a record exceeds; None where it has none."""
    sizes = [look.size for look in looks.values() if look.size]
    return (max(w for w, _ in sizes), max(h for _, h in sizes)) if sizes else None


def _picture_faults(turn: Turn, looks: dict[str, Look]) -> Iterator[Fault]:
    for part in turn.parts:
        if isinstance(part, ImagePart) and part.source:
            yield from looks[part.source].faults


def _empty_turn_faults(turn: Turn) -> Iterator[Fault]:
    """A question or an answer without a word or picture: readable, but it teaches silence."""
    if turn.role != "system" and turn.is_blank:
        message = f"{turn.name} is empty"
        fix = "write what is said, or remove the question with its answer"
        yield Fault("empty_turn", message, fix, "strict")
