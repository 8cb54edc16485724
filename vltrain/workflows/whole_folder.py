"""Folders that are there whole or not at all."""

import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vltrain.errors import VltrainError


def refuse_existing(out: Path) -> None:
    """Raise VltrainError where a folder cannot be made, or something has its name already."""
    if os.path.lexists(out):
        raise VltrainError.at(
            str(out), what="exists already", fix="name another folder, or remove this one first"
        )
    there = _nearest(out)
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        what = "may not be written to" if there.is_dir() else "is a file"
        raise VltrainError.at(
            str(out), what=f"cannot be made: {there} {what}", fix="name a folder elsewhere"
        )


def refuse_small_disk(out: Path, needed_bytes: int) -> None:
    """Raise VltrainError where a folder of so many bytes does not fit on its disk."""
    free = shutil.disk_usage(_nearest(out)).free
    if needed_bytes > free:
        raise VltrainError.at(
            str(out),
            what=f"needs {needed_bytes / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free there",
            fix="make space, or name a folder on another disk",
        )


def _nearest(out: Path) -> Path:
    """What is there of the way to a folder."""
    return next(above for above in out.absolute().parents if os.path.lexists(above))


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write into; it becomes `out` when the block ends without error.

    What killed processes left beside `out` is removed first.
    """
    for leftover in out.parent.glob(f"{glob.escape(out.name)}.partial-*"):
        if not _is_running(leftover.name.rpartition("-")[2]):
            shutil.rmtree(leftover)
    draft = out.with_name(f"{out.name}.partial-{os.getpid()}")
    draft.mkdir(parents=True)
    try:
        yield draft
        draft.rename(out)
    except BaseException:
        shutil.rmtree(draft)
        raise


def _is_running(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        return True  # somebody else's process
    return True
