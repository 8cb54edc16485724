"""`--gpus N`: the same command in N processes of each machine, by `torch.distributed.run`."""

import logging
import os
import signal
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from vltrain.cores import usable_cores
from vltrain.errors import Stopped, VltrainError
from vltrain.training.machines import Machines
from vltrain.training.processes import EXIT_CODE_FILE, started_by_torchrun

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure


def refuse_wrong_count(gpus: int) -> None:
    """Raise VltrainError where `--gpus` is not what there is, or not what torchrun has started."""
    import torch

    if started_by_torchrun():
        there = int(os.environ["LOCAL_WORLD_SIZE"])
        if gpus != there:
            raise VltrainError.at(
                f"--gpus {gpus}",
                what=f"torchrun has started {there} processes on this machine",
                fix="leave --gpus out, or torchrun",
            )
    elif torch.cuda.device_count() < gpus:
        raise VltrainError.at(
            f"--gpus {gpus}",
            what=f"this machine has {torch.cuda.device_count() or 'no'} GPUs that torch can use",
            fix="give fewer; on CPUs, torchrun --nproc_per_node 2 -m vltrain … starts processes",
        )


def launch(processes: int, words: Sequence[str], machines: Machines | None = None) -> int:
    """Run `vltrain WORDS` in several processes that form one run.

    Args:
        processes: how many on this machine; each takes a GPU of its own where there are any.
        words: of the command line, after `vltrain`.
        machines: how this machine meets the others of the run; None: there are none.

    Returns:
        The exit code: 0, or that of the first process to fail or to stop; 128 + N where signal N
        ended it.

    Raises:
        VltrainError: the machines cannot meet.
        Stopped: a signal came before the processes were started.
    """
    watch_signals()
    import torch.distributed.launcher.api  # noqa: F401, so that its loggers are there
    from torch.distributed.run import config_from_args, parse_args

    machines = machines or Machines()
    machines.refuse_unknown_name()
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // processes)))
    _quiet_torchrun()
    # Said outright, or torchrun would take them from the environment.
    flags = [f"--rdzv-id={uuid.uuid4()}"] if machines.count == 1 else ["--rdzv-id=none"]
    flags += [*machines.torchrun_flags(), f"--nproc-per-node={processes}", "--max-restarts=0"]
    config, command, arguments = config_from_args(
        parse_args([*flags, "-m", "vltrain", *map(str, words)])
    )
    with tempfile.NamedTemporaryFile() as told:
        os.environ[EXIT_CODE_FILE] = told.name
        return _exit_code(
            lambda: _start(config, command, arguments), Path(told.name), processes, machines
        )


def _quiet_torchrun() -> None:
    """Silence what it reports of a failed process, which that process has said itself."""
    for name in [*logging.root.manager.loggerDict]:
        if name.startswith("torch.distributed.elastic"):  # each has a level of its own
            logging.getLogger(name).setLevel(logging.CRITICAL)


def _start(config: Any, command: Any, arguments: Sequence[str]) -> None:
    from torch.distributed.launcher.api import elastic_launch

    elastic_launch(config, command)(*arguments)


def _exit_code(run: Callable[[], None], told: Path, processes: int, machines: Machines) -> int:
    """Let the processes run, and say what their end means where they have not.

    Args:
        run: starts them, and returns when all have ended well.
        told: where they write the exit code of the run.
        processes: how many there are on this machine.
        machines: as they meet.
    """
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    try:
        run()
    except ChildFailedError as error:
        rank, failure = _cause(error)
        if failure.exitcode > 0:
            return failure.exitcode
        _say(
            f"error: process {rank} of {processes * machines.count} was ended by "
            f"{failure.signal_name()}, and the run with it",
            "start the same command again; it resumes",
        )
        return 128 - failure.exitcode
    except SignalException as error:
        # The signal went on to the processes, which stop in order and say their code.
        if said := told.read_text(encoding="utf-8"):
            return int(said)
        if error.sigval not in (signal.SIGTERM, signal.SIGINT):
            return 128 + error.sigval
        _say(
            f"stopped by {error.sigval.name} before the step in hand could be saved",
            "give the same command again; it goes on from the last checkpoint",
        )
        return Stopped.exit_code
    except (RendezvousError, DistError) as error:
        if not _started():
            raise _not_met(machines, error) from None
        if said := told.read_text(encoding="utf-8"):
            return int(said)
        _say(
            "error: the run has ended on another machine, and here with it",
            "its own output says why; the same command on all machines goes on",
        )
        return 1
    return 0


def _cause(error: "ChildFailedError") -> tuple[int, "ProcessFailure"]:
    """The process that failed of itself, by rank.

    Others can end because they miss it before torchrun looks, whose clock counts whole seconds.
    None kills itself; a library that gives up aborts.
    """
    for rank, failure in error.failures.items():
        if -failure.exitcode in (signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS):
            return rank, failure
    return error.get_first_failure()


def _say(what: str, fix: str) -> None:
    print(f"{what}\n  fix: {fix}", file=sys.stderr)


def _not_met(machines: Machines, error: Exception) -> VltrainError:
    cause = error.__cause__ or error  # of a RendezvousError, which says less
    reason = str(cause).strip().partition("\n")[0] or type(cause).__name__
    return machines.wrong(
        f"the machines of the run have not met: {reason}",
        "start the command on all of them, with the same address, of one that is among them and "
        "that the others reach by that name and port; each run has a port or --rdzv-id of its own",
    )


def watch_signals() -> None:
    """Let signals stop the run in order, whenever they come.

    torch hands SIGTERM and SIGINT on to the processes that it has started, and ends them half a
    minute later; before, nothing is lost and the launcher may leave. SIGUSR1 is a warning that
    leaves more time, and only handed on. The processes begin with it blocked, as this thread has
    it, so that it waits until they know what to do with it.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _leave)
    signal.signal(signal.SIGUSR1, _hand_on)  # for threads that libraries started before
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    threading.Thread(target=_wait_for_warnings, daemon=True).start()


def _started() -> bool:
    """Whether there have been processes of the run: torch then has its own handlers."""
    return signal.getsignal(signal.SIGTERM) is not _leave


def _leave(_: int, __: FrameType | None) -> None:
    raise Stopped("stopped before the processes of the run had met; the same command starts it")


def _wait_for_warnings() -> None:
    while True:
        _hand_on(signal.sigwait({signal.SIGUSR1}))


def _hand_on(number: int, _: FrameType | None = None) -> None:
    """Give a warning to the processes of the run."""
    import psutil

    children = psutil.Process().children()
    for child in children:
        child.send_signal(number)
    if not children and not _started():
        signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)
