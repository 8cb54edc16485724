"""Files that are there whole or not at all, and disks that are full."""

import errno
import os
import re
from pathlib import Path

PARTIAL = ".partial"  # the ending of what is not whole yet

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""No space left, the user's share of it used up, a file larger than allowed."""

FULL_WORDS = re.compile(
    r"No space left|Disk quota exceeded|File too large|file write failed|iostream error"
    r"|unexpected pos \d+ vs \d+"
)
"""What torch and safetensors say of it, whose errors carry no number."""


def write_whole(path: Path, text: str, *, errors: str = "strict") -> None:
    """Write a file beside its place and rename it: it is there whole or not at all.

    Args:
        path: the file; an older one is replaced.
        text: written as UTF-8.
        errors: what becomes of characters that UTF-8 has no bytes for, as `open` has it.
    """
    partial = path.with_name(path.name + PARTIAL)
    with partial.open("w", encoding="utf-8", errors=errors) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def is_disk_full(error: BaseException) -> bool:
    """Whether an error, or one that it came from, says that nothing more can be written."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in FULL:
            return True
        if FULL_WORDS.search(str(cause)):
            return True
        cause = cause.__cause__ or cause.__context__
    return False
