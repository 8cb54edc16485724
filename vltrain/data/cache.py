"""A folder of things that are dear to make, each made by one process and used by all.

Each entry is a folder of its own. It is made beside its place and renamed, so that it is there
whole or not at all; a lock that ends with its process keeps a second one from making it at the
same time.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from vltrain.errors import VltrainError

UNUSED_SECONDS = 30 * 24 * 3600  # after which an entry is removed
_DRAFT = ".draft"  # the ending of what is not whole yet


class CacheEntry:
    """One entry: a folder that is there whole or not at all."""

    def __init__(self, parent: Path, name: str) -> None:
        """`parent` holds all entries of a kind."""
        self.folder = parent / name
        self._draft = parent / (name + _DRAFT)
        self._parent = parent

    @contextmanager
    def locked(self, on_wait: Callable[[], None]) -> Iterator[None]:
        """Keep all other processes from this entry; `on_wait` is called where one has it.

        Raises:
            VltrainError: nothing can be written there.
        """
        from filelock import FileLock, Timeout

        lock = FileLock(f"{self.folder}.lock")
        try:
            self._parent.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                on_wait()
                lock.acquire()
        except OSError as error:
            raise unwritable(self._parent, error) from error
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def draft(self) -> Iterator[Path]:
        """An empty folder to make the entry in; gone afterwards unless `keep` was called.

        Raises:
            VltrainError: it cannot be written.
        """
        shutil.rmtree(self._draft, ignore_errors=True)
        try:
            self._draft.mkdir()
            yield self._draft
        except OSError as error:
            raise unwritable(self._parent, error) from error
        finally:
            shutil.rmtree(self._draft, ignore_errors=True)

    def keep(self) -> None:
        """Put the draft in the entry's place."""
        shutil.rmtree(self.folder, ignore_errors=True)
        os.replace(self._draft, self.folder)

    def touch(self) -> None:
        """Note that the entry is in use, and remove those that have not been for long."""
        os.utime(self.folder)
        for other in self._parent.iterdir():
            try:
                unused = time.time() - other.stat().st_mtime > UNUSED_SECONDS
            except FileNotFoundError:  # another process removed it
                continue
            if other.is_dir() and unused:
                shutil.rmtree(other, ignore_errors=True)


def unwritable(folder: Path, error: OSError) -> VltrainError:
    """The error of a cache that cannot be written."""
    return VltrainError.at(
        str(folder),
        what=f"cannot be written ({error.strerror or error})",
        fix="set data.cache_dir to a folder with room, or make room there",
    )
