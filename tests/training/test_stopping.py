"""What signals do to a run, and what they do not to the processes that read data."""

import os
import signal
import threading
import time
from multiprocessing import get_context

import pytest

from vltrain.errors import Stopped
from vltrain.training.stopping import LeaveSignals, StopSignals

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_between_steps_is_noted_and_said(number, capfd):
    signals = StopSignals()
    with signals.caught(), signals.noted():
        assert not signals.requested()

        os.kill(os.getpid(), number)

        assert signals.requested()
    assert f"{number.name}: stopping after this step" in capfd.readouterr().err


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_while_no_step_is_taken_stops_at_once(number):
    with pytest.raises(Stopped, match=f"stopped by {number.name}"), StopSignals().caught():
        os.kill(os.getpid(), number)


def test_a_second_ctrl_c_does_not_wait_for_the_step():
    signals = StopSignals()
    with signals.caught(), signals.noted():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_the_end_of_the_time_after_its_warning_changes_nothing():
    signals = StopSignals()
    with signals.caught(), signals.noted():
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)

    assert signals.received == signal.SIGUSR1


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in SIGNALS]

    with StopSignals().caught():
        assert [signal.getsignal(number) for number in SIGNALS] != before

    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_run_in_another_thread_goes_without_signals():
    entered = []

    def enter() -> None:
        with StopSignals().caught():
            entered.append(True)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()

    assert entered == [True]


def test_a_process_that_reads_data_outlives_the_signals_of_its_group():
    def read(ready) -> None:
        LeaveSignals(ready.put)(0)
        time.sleep(0.5)
        os._exit(7)

    fork = get_context("fork")
    ready = fork.Queue()
    reader = fork.Process(target=read, args=(ready,))
    reader.start()
    assert ready.get(timeout=30) == 0  # what was to be called before is called

    for number in SIGNALS:
        os.kill(reader.pid, number)

    reader.join()
    assert reader.exitcode == 7
