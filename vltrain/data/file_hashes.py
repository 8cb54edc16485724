"""The hash of a file, computed once and again only where the file may be another."""

import hashlib
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SETTLED_NS = 2_000_000_000  # clocks of file systems are coarse: a younger file may change unseen

Stamp = list[int]
"""Bytes, times of the last change of content and of anything (nanoseconds), and inode: no write
leaves all of them as they were, for the second time is nobody's to set."""


def stamp_of(path: Path) -> Stamp:
    found = os.stat(path)
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def hashed(
    path: Path, known: Mapping[str, Any] | None, stamp: Stamp | None
) -> tuple[dict[str, Any], Stamp | None]:
    """The bytes and SHA-256 of a file, and by what it is known again without being read.

    Args:
        path: of the file.
        known: what an earlier call said of it; None: nothing.
        stamp: by what it would be known again then; None: by nothing.

    Returns:
        `bytes` and `sha256`; and its stamp, None where it changed so lately, or while it was read,
        that a stamp says nothing.
    """
    before = stamp_of(path)
    if known is not None and stamp == before:
        return dict(known), stamp
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    settled = before == stamp_of(path) and time.time_ns() - max(before[1:3]) > SETTLED_NS
    return {"bytes": before[0], "sha256": digest.hexdigest()}, before if settled else None
