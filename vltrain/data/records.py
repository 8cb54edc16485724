"""One record of a data file, or the place where none could be read.

A record is one element of a JSON list, one line of a JSONL file or one row of a table; its number
counts from 0 and names it in every error: `train.json#17`.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from vltrain.data.faults import Fault


@dataclass(frozen=True)
class Record:
    """One element of a data file, as its JSON has it."""

    file: Path  # or folder, or name on the hub
    index: int  # in the list or the table, or the line of a JSONL file; from 0
    value: Any
    held_bytes: int = field(default=0, compare=False)  # of a table's row, about; pictures are in it
    source: int = field(default=0, compare=False)  # place, among what a run reads, of what it is in

    @property
    def name(self) -> str:
        """What errors call it."""
        return f"{self.file.name}#{self.index}"


@dataclass(frozen=True)
class Unreadable:
    """A place of a file where no record could be read."""

    file: Path
    index: int | None  # None: the fault is the file's
    fault: Fault
    held_bytes: ClassVar[int] = 0

    @property
    def name(self) -> str:
        """What errors call it."""
        return self.file.name if self.index is None else f"{self.file.name}#{self.index}"
