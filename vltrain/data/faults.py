"""What is wrong with a record, as a value: readers collect faults, `checks` reports them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from vltrain.errors import VltrainError

Grade = Literal["unreadable", "strict", "warning"]


@dataclass(frozen=True)
class Fault:
    """One thing wrong with a record or a file.

    `grade` says who minds: "unreadable" cannot be laid out at all; "strict" is refused unless
    a run asks for what the original code accepted (`labels="reference"`); "warning" is likely
    a mistake and never in the way.
    """

    kind: str  # a short word to group by: "missing_picture", "order"
    message: str
    fix: str
    grade: Grade = "unreadable"

    def refused(self, *, lenient: bool) -> bool:
        """Does a reader stop at this fault?"""
        return self.grade == "unreadable" or (self.grade == "strict" and not lenient)


def error_of(faults: Sequence[Fault], where: str) -> VltrainError:
    """All faults of one place as one error; its first line is the fault itself if there is one."""
    if len(faults) == 1:
        return VltrainError.at(where, what=faults[0].message, fix=faults[0].fix)
    lines = "".join(f"\n  {fault.message}\n    fix: {fault.fix}" for fault in faults)
    return VltrainError(f"{where}: {len(faults)} faults{lines}")
