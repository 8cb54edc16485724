"""Folders that are there whole or not at all."""

import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vltrain.errors import VltrainError


def refuse_existing(out: Path) -> None:
    """Raise VltrainError where something has the name of a folder that is to be made."""
    if out.exists() or out.is_symlink():
        raise VltrainError.at(
            str(out), what="exists already", fix="name another folder, or remove this one first"
        )


def refuse_small_disk(out: Path, needed_bytes: int) -> None:
    """Raise VltrainError where a folder of so many bytes does not fit on its disk."""
    there = next(folder for folder in out.absolute().parents if folder.exists())
    free = shutil.disk_usage(there).free
    if needed_bytes > free:
        raise VltrainError.at(
            str(out),
            what=f"needs {needed_bytes / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free there",
            fix="make space, or name a folder on another disk",
        )


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
