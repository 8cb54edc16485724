"""What went wrong, said so that the user can mend it."""

from typing import Self


class VltrainError(Exception):
    """A mistake the user can mend. One string, so it survives DataLoader workers."""

    @classmethod
    def at(cls, where: str, *, what: str, fix: str) -> Self:
        """An error that names the place, the fault and the way out."""
        return cls(f"{where}: {what}\n  fix: {fix}")
