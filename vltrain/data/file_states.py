"""Size and time of files, by which a later run sees that one of them is another."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from vltrain.data.arrow_stream import ArrowStream

BATCH_STATES = 10_000  # written and read together
MOST_REMEMBERED = 100_000  # of which a writer knows that it has written them


class FileState(NamedTuple):
    """What a file was like."""

    path: str
    size: int  # bytes; below 0 where there was no file
    time: int  # of the last change, nanoseconds


def state_of(path: str | Path) -> FileState | None:
    """What a file is like; None where it is not there."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return FileState(os.path.abspath(path), found.st_size, found.st_mtime_ns)


def state_or_absence(path: str | Path) -> FileState:
    """What a file is like, or that it is not there: a size below 0."""
    return state_of(path) or FileState(os.path.abspath(path), -1, 0)


def first_change(states: Iterable[FileState]) -> str | None:
    """The first of some files that is another than it was, gone, or new; None: there is none."""
    return next((was.path for was in states if state_or_absence(was.path) != was), None)


class StateWriter(ArrowStream):
    """Writes the states of many files into an Arrow stream, most of them once."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa

        columns = [("path", pa.large_string()), ("size", pa.int64()), ("time", pa.int64())]
        super().__init__(path, pa.schema(columns))
        self._waiting: list[FileState] = []
        self._known: dict[FileState, None] = {}

    def write(self, states: Iterable[FileState]) -> None:
        """Add states; those that were added lately are passed over."""
        for state in states:
            if state in self._known:
                continue
            if len(self._known) >= MOST_REMEMBERED:
                del self._known[next(iter(self._known))]  # the oldest
            self._known[state] = None
            self._waiting.append(state)
        if len(self._waiting) >= BATCH_STATES:
            self.finish()

    def finish(self) -> None:
        self.write_batch(zip(*self._waiting, strict=True) if self._waiting else [(), (), ()])
        self._waiting = []


def read_states(path: Path) -> Iterator[FileState]:
    """What a `StateWriter` wrote."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
        for batch in stream:
            columns = (column.to_pylist() for column in batch.columns)
            yield from map(FileState, *columns)
