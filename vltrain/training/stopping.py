"""Signals that ask a run to stop."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from vltrain.errors import Stopped

WATCHED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""From a scheduler or torchrun; from the keyboard; Slurm's warning before the time is up."""


class StopSignals:
    """Notes that a run was asked to stop.

    While steps are taken (`noted`), a signal is only noted, so that the step in hand and a
    checkpoint of it can be finished. Before and after, nothing would be won by waiting:
    `Stopped` is raised. A second SIGINT ends the run at once.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._only_noted = False
        self._process = os.getpid()

    def requested(self) -> bool:
        """Whether this process was asked to stop."""
        return self.received is not None

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Catch the signals; those of another thread than the main one cannot be."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._receive) for number in WATCHED}
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        try:
            # One that came while it was blocked, as `vltrain --gpus` has it, arrives here.
            signal.pthread_sigmask(signal.SIG_UNBLOCK, WATCHED)
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Let signals be noted, for whoever asks `requested` after each step."""
        self._only_noted = True
        try:
            yield
        finally:
            self._only_noted = False

    def _receive(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a process that reads data: whoever started it sees to its end
        again = self.received is not None
        self.received = self.received or signal.Signals(number)
        if again and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self._only_noted:
            raise Stopped(
                f"stopped by {signal.Signals(number).name} while no step was being taken; "
                "the same command goes on from the last checkpoint"
            )
        if not again:
            hint = ", Ctrl-C again stops at once" if number == signal.SIGINT else ""
            text = f"\n{self.received.name}: stopping after this step{hint}\n"
            os.write(2, text.encode())  # unlike print, may interrupt a print


class LeaveSignals:
    """Lets the processes that read data leave signals to the one that started them.

    Ctrl-C, a scheduler and torchrun signal a whole group of processes; a run whose readers are
    gone could not finish its step.
    """

    def __init__(self, then: Any) -> None:
        """`then`: what a DataLoader's `worker_init_fn` was before."""
        self.then = then

    def __call__(self, worker: int) -> None:
        for number in WATCHED:
            signal.signal(number, signal.SIG_IGN)
        if self.then is not None:
            self.then(worker)
