"""Checkpoints that are there whole or not at all, and which of them go.

    RUN/checkpoint.partial/checkpoint-8/   while it is written
    RUN/checkpoint-8/                      after that, with manifest.json: its files and sizes

A checkpoint gets its name when every file of it, whichever process wrote it, lies on the disk. So
a kill leaves no half one; one that was damaged later is told by its manifest and passed over.
"""

import json
import logging
import os
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

from vltrain.training.files import PARTIAL, write_whole

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
SHELF = f"checkpoint{PARTIAL}"  # the folder in a run's where checkpoints are written


def checkpoint_step(checkpoint: Path) -> int:
    """The step after which a checkpoint was saved, read from its name."""
    return int(checkpoint.name.rpartition("-")[2])


def checkpoints(run: Path) -> list[Path]:
    """All checkpoints of a run, whole or not, the oldest first."""
    found = [p for p in run.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted(found, key=checkpoint_step)


def last_whole(run: Path) -> Path | None:
    """The newest checkpoint that a run can go on from; others are passed over with a warning."""
    for checkpoint in reversed(checkpoints(run)):
        fault = checkpoint_fault(checkpoint)
        if fault is None:
            return checkpoint
        logger.warning("%s is passed over: %s", checkpoint, fault)
    return None


def publish(draft: Path, place: Path) -> None:
    """Give a checkpoint its name.

    Args:
        draft: the folder that all of it was written to.
        place: where it belongs; a broken one that lies there is replaced.
    """
    files = sorted(p for p in draft.rglob("*") if p.is_file() and p.suffix != ".md")
    for file in files:
        _to_disk(file)
    sizes = {file.relative_to(draft).as_posix(): file.stat().st_size for file in files}
    write_whole(draft / MANIFEST, json.dumps({"files": sizes}, indent=1) + "\n")
    _to_disk(draft)
    remove(place)
    os.replace(draft, place)
    _to_disk(place.parent)


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint; one that a kill leaves half deleted has another name."""
    doomed = checkpoint.with_name(checkpoint.name + PARTIAL)
    shutil.rmtree(doomed, ignore_errors=True)
    if checkpoint.exists():
        os.replace(checkpoint, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def clear_drafts(run: Path) -> None:
    """Delete what a kill has left of checkpoints being written or deleted."""
    for draft in run.glob(f"checkpoint*{PARTIAL}"):
        shutil.rmtree(draft, ignore_errors=True)


def rotate(newest: Path, *, keep: int | None, best: Path | None = None) -> None:
    """Delete the oldest checkpoints where there are more than `keep`.

    Only those older than `newest` go, and only if that one is whole: what a run could go on
    from when all later ones are damaged stays.

    Args:
        newest: the checkpoint that was saved last.
        keep: how many may lie there, `newest` and `best` among them; None or 0: any number.
        best: one that stays whatever its age.
    """
    if not keep:
        return
    fault = checkpoint_fault(newest)
    if fault is not None:
        logger.warning("no older checkpoint is deleted: %s: %s", newest, fault)
        return
    protected = {newest} if best is None else {newest, best}
    step = checkpoint_step(newest)
    older = [c for c in checkpoints(newest.parent) if checkpoint_step(c) < step]
    surplus = len(older) + 1 - max(keep, len(protected))
    for checkpoint in [c for c in older if c not in protected][: max(0, surplus)]:
        remove(checkpoint)


def checkpoint_fault(checkpoint: Path) -> str | None:
    """Why nothing can resume from a checkpoint; None where it is whole.

    Every file that was saved must be there in its size and open as what it is. Of large files
    the directory alone is read, which lies at one end of them.
    """
    from safetensors import SafetensorError

    try:
        sizes = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return f"it has no {MANIFEST}, so nobody can say what belongs to it"
    except (ValueError, KeyError):
        return f"its {MANIFEST} is broken"
    for name, size in sizes.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        there = file.stat().st_size
        if there != size:
            return f"{name} has {there:,} bytes of {size:,}"
        try:
            OPENERS.get(file.suffix, _stays_closed)(file)
        except (OSError, ValueError, zipfile.BadZipFile, SafetensorError) as error:
            return f"{name} does not open ({error})"
    return None


def _open_safetensors(file: Path) -> None:
    from safetensors import safe_open

    with safe_open(file, framework="numpy"):
        pass


def _open_torch_file(file: Path) -> None:
    with zipfile.ZipFile(file):
        pass


def _open_json(file: Path) -> None:
    json.loads(file.read_text(encoding="utf-8"))


def _stays_closed(_: Path) -> None:
    """Of a file of another kind its size must do."""


OPENERS: dict[str, Callable[[Path], None]] = {
    ".safetensors": _open_safetensors,
    ".pt": _open_torch_file,
    ".pth": _open_torch_file,
    ".json": _open_json,
}
"""How the kinds of files in a checkpoint are opened; they raise where one is broken."""


def _to_disk(path: Path) -> None:
    """Return when a file, or a folder's list of files, would outlive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
