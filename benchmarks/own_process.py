"""Measurements in a process of their own, given up after some time."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from typing import Any

from merge_memory import tree

Row = dict[str, Any]


def rows_of(
    measure: Callable[..., None], arguments: tuple[Any, ...], seconds: float
) -> Iterator[Row]:
    """The rows that a process sends, as they come, for so many seconds at most.

    Args:
        measure: what the process does: it is given `arguments` and a connection, into which it
            sends its rows, then None.

    Yields:
        Its rows; behind them one that says why it came to no end, where it did not.
    """
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(*arguments, sender))
    process.start()
    sender.close()
    deadline = time.monotonic() + seconds
    try:
        while receiver.poll(max(0.0, deadline - time.monotonic())):
            row = receiver.recv()
            if row is None:
                return
            yield row
        yield {"failed": f"no end in {seconds:.0f} s"}
    except EOFError:
        process.join()
        yield {"failed": f"the process ended with {process.exitcode}"}
    finally:
        for pid in tree(process.pid):
            os.kill(pid, signal.SIGKILL)
        process.join()
