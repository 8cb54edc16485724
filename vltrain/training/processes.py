"""The processes of one run, as torchrun starts them: which of them this is, how they end together.

Nothing heavy is imported before it is needed: the command line asks here before it knows whether
a run is wanted at all.
"""

import os
import signal
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

FAILURE_KEY = "vltrain/failed"  # in the store that torchrun keeps for the processes of a run
PATIENCE_SECONDS = 20.0  # torchrun ends the others of a machine within one
EXIT_CODE_FILE = "VLTRAIN_EXIT_CODE_FILE"  # where `vltrain --gpus` wants to be told the exit code
PR_SET_PDEATHSIG = 1  # of Linux' prctl: which signal a parent's death sends


def started_by_torchrun() -> bool:
    """Whether this process is one of a run's, the only one even."""
    return "LOCAL_RANK" in os.environ and "WORLD_SIZE" in os.environ


def process_count() -> int:
    """Processes of the run, on all machines."""
    return int(os.environ["WORLD_SIZE"]) if started_by_torchrun() else 1


def is_first() -> bool:
    """Whether this is the process that speaks and writes for all."""
    return not started_by_torchrun() or os.environ.get("RANK", "0") == "0"


def tie_to_launcher() -> None:
    """Let this process of a run die with torchrun, which started it in a session of its own.

    Whoever kills the launcher alone would leave it running otherwise. Linux sees to it at once,
    other systems within a second.
    """
    if not started_by_torchrun():
        return
    launcher = os.getppid()
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_die_after, args=(launcher,), daemon=True).start()


def _die_after(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGKILL)


def wait_for_all() -> None:
    """Return when every process of the run has come here."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.barrier()


def leave_group() -> None:
    """Part from the other processes in order, at the end of a run."""
    if not started_by_torchrun():
        return
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def end_after_failure(
    message: str, code: int, *, patience_seconds: float = PATIENCE_SECONDS
) -> NoReturn:
    """End this process of a run at once; the first of them to fail says why, for all.

    What is wrong for everyone, such as a recipe, is then said once; and where one process breaks
    off, the others, which fail a moment later because they miss it, do not bury its message.
    torchrun ends the rest as soon as one is gone. Threads and libraries are not asked: they may
    wait for processes that are no more.

    Args:
        message: what to say on stderr; the exit code follows on a line of its own, for torchrun's
            is 1 whatever happened.
        code: the exit code.
        patience_seconds: how long the others wait for torchrun to end them.
    """
    sys.stdout.flush()
    if _fails_first():
        _tell_torchrun(message)
        if EXIT_CODE_FILE in os.environ:
            Path(os.environ[EXIT_CODE_FILE]).write_text(str(code), encoding="utf-8")
        print(f"{message}\nexit code {code}", file=sys.stderr, flush=True)
    else:
        time.sleep(patience_seconds)
    os._exit(code)


def _fails_first() -> bool:
    """Whether no other process of the run has failed before."""
    from torch.distributed import DistError, TCPStore

    try:
        store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=5),
        )
        return store.add(f"{FAILURE_KEY}/{os.environ.get('TORCHELASTIC_RESTART_COUNT')}", 1) == 1
    except (DistError, KeyError, RuntimeError):  # torchrun is gone, or keeps no store
        return is_first()


def _tell_torchrun(message: str) -> None:
    """Leave the message where torchrun looks for one, for its own report at the end."""
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    get_error_handler().record_exception(RuntimeError(message))
