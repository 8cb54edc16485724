"""One function over many values, in worker processes, with results in the values' order."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import chain, islice
from typing import Any, TypeVar

from vltrain.cores import usable_cores

Value = TypeVar("Value")
Result = TypeVar("Result")

CHUNK_VALUES = 500
CHUNK_BYTES = 16 << 20  # so that a chunk of records with their pictures in them stays small
MOST_WORKERS = 8  # the one process that reads the values keeps no more busy
_AHEAD = 3  # chunks a worker may be ahead of the reader, so that memory stays flat

_work: Callable[[Any], Any]  # in a worker process: what it does with a chunk


def worker_count() -> int:
    """Processes to work in on this machine."""
    return min(usable_cores(), MOST_WORKERS)


def map_chunks(
    function: Callable[[list[Value]], Result],
    values: Iterable[Value],
    *,
    workers: int,
    chunk_values: int = CHUNK_VALUES,
    size_of: Callable[[Value], int] | None = None,
) -> Iterator[Result]:
    """The results of a function over lists of values that follow each other, in order.

    No process is started for one worker or one chunk.

    Args:
        function: can be pickled; each worker has its own copy, which it keeps.
        values: read as they are needed.
        workers: processes, 1 for none beside this one.
        chunk_values: how many values the function gets at once, at most.
        size_of: how many bytes a value holds; the function gets no more values at once than
            reach `CHUNK_BYTES`. None: values are small.
    """
    chunks = _chunks(iter(values), chunk_values, size_of)
    first = list(islice(chunks, 2))
    if workers < 2 or len(first) < 2:
        yield from map(function, chain(first, chunks))
        return
    waiting: deque[Future[Result]] = deque()
    pool = ProcessPoolExecutor(workers, initializer=_begin_work, initargs=(function,))
    try:
        for chunk in chain(first, chunks):
            waiting.append(pool.submit(_work_on, chunk))
            if len(waiting) > workers * _AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _chunks(
    values: Iterator[Value], most: int, size_of: Callable[[Value], int] | None
) -> Iterator[list[Value]]:
    if size_of is None:
        while chunk := list(islice(values, most)):
            yield chunk
        return
    chunk, held = [], 0
    for value in values:
        chunk.append(value)
        held += size_of(value)
        if len(chunk) == most or held >= CHUNK_BYTES:
            yield chunk
            chunk, held = [], 0
    if chunk:
        yield chunk


def _begin_work(function: Callable[[Any], Any]) -> None:
    global _work
    _work = function


def _work_on(chunk: list[Any]) -> Any:
    return _work(chunk)
