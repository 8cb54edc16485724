"""One run in one directory: a lock that dies with the process that holds it."""

import errno
import logging
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vltrain.errors import VltrainError

logger = logging.getLogger(__name__)

LOCK = "run.lock"
PATIENCE_SECONDS = 5.0  # a process that was killed a moment ago may still be going


@contextmanager
def locked(folder: Path, *, patience_seconds: float = PATIENCE_SECONDS) -> Iterator[None]:
    """Keep other processes out of a run's directory, which is made if need be.

    The lock is the system's, on `run.lock`: no file that a kill leaves behind counts. It is not
    handed on to children, such as the workers that read data. A directory that nothing was
    written to is taken away again.

    Raises:
        VltrainError: another process holds it; says which.
    """
    made = [p for p in (folder, *folder.parents) if not p.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = _take(folder / LOCK, time.monotonic() + patience_seconds)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {platform.node()}\n".encode(), 0)
        yield
    finally:
        if os.listdir(folder) == [LOCK]:
            (folder / LOCK).unlink()
            for parent in made:
                if not os.listdir(parent):
                    parent.rmdir()
        os.close(descriptor)


def _take(path: Path, deadline: float) -> int:
    """The descriptor of the file at `path`, locked.

    Raises:
        VltrainError: it is another process's until the deadline.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        if _is_ours(descriptor, path):
            return descriptor
        holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
        os.close(descriptor)
        if time.monotonic() > deadline:
            raise VltrainError.at(
                str(path.parent),
                what=f"another run is going on in it ({holder or 'of a process not named yet'})",
                fix="wait for it to end, or give another --output",
            )
        time.sleep(0.1)


def _is_ours(descriptor: int, path: Path) -> bool:
    """Whether an open file could be locked, and still is the one at `path`."""
    import fcntl

    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        logger.warning("%s cannot be locked (%s): start no second run", path, error)
    return path.exists() and os.path.samestat(os.fstat(descriptor), path.stat())
