"""One function over many values, in worker processes, with results in the values' order."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import chain, islice
from typing import Any, TypeVar

Value = TypeVar("Value")
Result = TypeVar("Result")

CHUNK_VALUES = 500
_AHEAD = 3  # chunks a worker may be ahead of the reader, so that memory stays flat

_work: Callable[[Any], Any]  # in a worker process: what it does with a chunk


def map_chunks(
    function: Callable[[list[Value]], Result],
    values: Iterable[Value],
    *,
    workers: int,
    chunk_values: int = CHUNK_VALUES,
) -> Iterator[Result]:
    """The results of a function over lists of values that follow each other, in order.

    No process is started for one worker or one chunk.

    Args:
        function: can be pickled; each worker has its own copy, which it keeps.
        values: read as they are needed.
        workers: processes, 1 for none beside this one.
        chunk_values: how many values the function gets at once.
    """
    chunks = _chunks(iter(values), chunk_values)
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


def _chunks(values: Iterator[Value], size: int) -> Iterator[list[Value]]:
    while chunk := list(islice(values, size)):
        yield chunk


def _begin_work(function: Callable[[Any], Any]) -> None:
    global _work
    _work = function


def _work_on(chunk: list[Any]) -> Any:
    return _work(chunk)
