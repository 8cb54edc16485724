"""Findings that no record shows by itself: what repeats, and what is unlike the rest.

Of each record a few bytes are kept while it is checked (`tallies`). Where they show something,
the files are read once more for the names of the records that it concerns.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vltrain.data.conversation import Conversation
from vltrain.data.findings import Finding
from vltrain.data.formats import record_id
from vltrain.data.grounding import GRID, PIXELS_TO_GRID
from vltrain.data.records import Record, Unreadable
from vltrain.data.tallies import NO_CONTENT, FileTally, Traits, learned_answers

Unit = Literal["tokens", "characters"]

ONE_ANSWER_SHARE = 0.95  # of a file's answers, or more, are the same
_FEWEST_ANSWERS = 20
_FEWEST_LENGTHS = 10
_FROM_MIDDLE, _FROM_MOST = 8, 3  # times as long, or as short, as the middle and most records
_LEAST_GAP = {"tokens": 200, "characters": 800}  # to most records, or nothing is odd
_MOST_ODD, _MOST_ODD_SHARE = 3, 0.01  # more are no oddity but a kind of record
_SHOWN = 60  # characters of an answer
_BLOCK = 1 << 16  # records looked at together, so that memory stays flat


@dataclass(frozen=True)
class _Clues:
    """What the second reading looks for among a file's records; places count from 0."""

    repeats: dict[int, int]  # place -> content, of all records whose content is there again
    odd: dict[int, str]  # place -> what is odd about the length
    suspect: str | None  # what may be nearly all that is answered

    @property
    def any(self) -> bool:
        """Is there anything to look for?"""
        return bool(self.repeats or self.odd or self.suspect is not None)


@dataclass
class Survey:
    """The tallies of all files, in order."""

    unit: Unit = "characters"
    tallies: list[FileTally] = field(default_factory=list)

    def add(self, tallies: Iterable[FileTally]) -> None:
        """Add the tallies of the records that come next."""
        for tally in tallies:
            if self.tallies and self.tallies[-1].file == tally.file:
                self.tallies[-1].add(tally)
            else:
                self.tallies.append(tally)

    def count(self, file: Path, traits: Traits | None) -> None:
        """Count the record of a file that comes next; None: it could not be read."""
        if not self.tallies or self.tallies[-1].file != file:
            self.tallies.append(FileTally(file))
        self.tallies[-1].count(traits)

    def findings(
        self,
        entries: Callable[[], Iterable[Record | Unreadable]],
        read: Callable[[Record], Conversation | None],
    ) -> Iterator[Finding]:
        """All that the tallies show.

        Args:
            entries: gives those that were tallied once more; not called where all is well.
            read: reads a record; None where it cannot be read.
        """
        repeats = _repeats([np.frombuffer(tally.contents, np.uint64) for tally in self.tallies])
        clues = [
            _Clues(found, _odd_lengths(tally, self.unit), _suspect(tally))
            for found, tally in zip(repeats, self.tallies, strict=True)
        ]
        if any(clue.any for clue in clues):
            yield from _second_reading(entries(), clues, read)
        for tally in self.tallies:
            if tally.boxes.looks_like_pixels:
                yield _pixel_boxes(tally.file)


def _second_reading(
    entries: Iterable[Record | Unreadable],
    clues: Sequence[_Clues],
    read: Callable[[Record], Conversation | None],
) -> Iterator[Finding]:
    """What the clues come to, with the names of the records."""
    firsts: dict[int, tuple[Path, int]] = {}  # content -> where it stands first
    records = (entry for entry in entries if isinstance(entry, Record))
    files = groupby(records, key=lambda record: record.file)
    for (file, group), clue in zip(files, clues, strict=False):
        said = total = 0
        for place, record in enumerate(group):
            if place in clue.repeats:
                first = firsts.setdefault(clue.repeats[place], (record.file, record.index))
                if first != (record.file, record.index):
                    yield _duplicate(record, *first)
            if place in clue.odd:
                yield _odd_length(record, clue.odd[place])
            if clue.suspect is not None and (conversation := read(record)):
                answers = learned_answers(conversation)
                said, total = said + answers.count(clue.suspect), total + len(answers)
        if clue.suspect is not None and said >= ONE_ANSWER_SHARE * total:
            yield _one_answer(file, clue.suspect, said, total)


def _repeats(contents: Sequence[NDArray[np.uint64]]) -> list[dict[int, int]]:
    """For each file the places whose content stands elsewhere too, with that content."""
    if not contents:
        return []
    ordered = np.concatenate(contents)
    ordered.sort()
    repeated = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    repeated = repeated[repeated != NO_CONTENT]
    return [_places(found, repeated) for found in contents]


def _places(contents: NDArray[np.uint64], wanted: NDArray[np.uint64]) -> dict[int, int]:
    """Where in `contents` one of the wanted numbers is (they are in order), and which."""
    places: dict[int, int] = {}
    for start in range(0, len(contents) if len(wanted) else 0, _BLOCK):
        block = contents[start : start + _BLOCK]
        nearest = wanted[np.minimum(np.searchsorted(wanted, block), len(wanted) - 1)]
        for place in np.flatnonzero(nearest == block).tolist():
            places[start + place] = int(block[place])
    return places


def _odd_lengths(tally: FileTally, unit: Unit) -> dict[int, str]:
    """The places of records whose lengths are far from those of the others, and how far."""
    every = np.frombuffer(tally.lengths, np.uint32)
    known = np.sort(every[every > 0])
    others = len(known) - 1
    if others + 1 < _FEWEST_LENGTHS:
        return {}
    middle = int(known[len(known) // 2])
    most = int(known[-(-others * 95 // 100) - 1])  # 95 % of the others have no more
    least = int(known[1 + others * 5 // 100])  # 95 % of the others have no less
    gap = _LEAST_GAP[unit]
    long = max(_FROM_MIDDLE * middle, _FROM_MOST * most, most + gap)
    short = min(middle // _FROM_MIDDLE, least // _FROM_MOST, least - gap)
    odd = np.flatnonzero((every > long) | ((every < short) & (every > 0)))
    if len(odd) > max(_MOST_ODD, _MOST_ODD_SHARE * len(known)):
        return {}
    usual = {
        True: f"far more than usual: half of the others have up to {middle:,}, 95 % up to {most:,}",
        False: f"far fewer than usual: half of the others have {middle:,} or more, "
        f"95 % {least:,} or more",
    }
    return {
        place: f"{every[place]:,} {unit}, {usual[bool(every[place] > middle)]}"
        for place in odd.tolist()
    }


def _suspect(tally: FileTally) -> str | None:
    """The answer that may be nearly all that is learned of a file, if there is one."""
    answers = tally.answers
    if answers.total < _FEWEST_ANSWERS:
        return None
    return answers.text if answers.lead >= (2 * ONE_ANSWER_SHARE - 1) * answers.total else None


def _duplicate(record: Record, file: Path, index: int) -> Finding:
    first = f"{file.name if file == record.file else file}#{index}"
    return _about(
        record,
        "duplicate",
        f"repeats {first} word for word",
        "remove one of them; an evaluation file that repeats training data measures memory",
    )


def _odd_length(record: Record, how: str) -> Finding:
    fix = "look at it: several records may have run together, or one been cut off"
    return _about(record, "odd_length", how, fix)


def _about(record: Record, kind: str, message: str, fix: str) -> Finding:
    identity = record_id(record.value)
    return Finding(str(record.file), record.index, identity, "warning", kind, message, fix)


def _one_answer(file: Path, answer: str, said: int, total: int) -> Finding:
    shown = answer if len(answer) <= _SHOWN else f"{answer[:_SHOWN]}…"
    message = f"{said:,} of {total:,} learned answers are {shown!r}"
    fix = "add records with other answers, or the model learns to say this to everything"
    return Finding(str(file), None, None, "warning", "one_answer", message, fix)


def _pixel_boxes(file: Path) -> Finding:
    message = (
        f"the boxes look like pixels: all lie inside the sizes of their pictures, where boxes on "
        f"the grid of {GRID} would spread over all of it"
    )
    fix = f"write {PIXELS_TO_GRID}; if they are on the grid, nothing is wrong"
    return Finding(str(file), None, None, "warning", "pixel_boxes", message, fix)
