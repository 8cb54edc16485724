"""What went wrong, said so that the user can mend it, and the exit code of each kind.

| code | |
| --- | --- |
| 0 | done |
| 1 | `VltrainError`: the user's to mend |
| 2 | the command line is wrong; typer says so |
| 3 | `GpuMemoryError` |
| 4 | `NotFiniteError` |
| 75 | `Stopped`: the same command goes on; EX_TEMPFAIL of sysexits.h |
"""

from typing import ClassVar, Self


class VltrainError(Exception):
    """A mistake the user can mend. One string, so it survives DataLoader workers."""

    exit_code: ClassVar[int] = 1

    @classmethod
    def at(cls, where: str, *, what: str, fix: str) -> Self:
        """An error that names the place, the fault and the way out."""
        return cls(f"{where}: {what}\n  fix: {fix}")


class GpuMemoryError(VltrainError):
    """A GPU's memory did not suffice."""

    exit_code = 3


class NotFiniteError(VltrainError):
    """The loss or its gradient became NaN or infinite."""

    exit_code = 4


class Stopped(BaseException):
    """A run was asked to stop, did so, and can go on.

    No mistake, and like KeyboardInterrupt no `Exception`: what recovers from errors on the way
    must not hold it up.
    """

    exit_code: ClassVar[int] = 75
