"""What a check of data files found, as values."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from vltrain.data.pictures import BAD_PICTURE_KINDS

DROPPING_KINDS = BAD_PICTURE_KINDS | {"too_long"}
"""Kinds of findings that leave a record out where they are no errors."""

Severity = Literal["error", "warning"]


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

    @property
    def drops(self) -> bool:
        """Whether a run leaves the record out because of it, and goes on."""
        return self.severity == "warning" and self.kind in DROPPING_KINDS


@dataclass(frozen=True)
class Report:
    """What a check of files found."""

    records: int  # read, faulty ones included
    findings: tuple[Finding, ...]
    dropped: int = 0  # left out by too_long="drop" or bad_pictures="drop"

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
