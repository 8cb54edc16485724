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
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    import torch
    from torch.distributed import TCPStore

FAILURE_KEY = "vltrain/failed"  # in the store that torchrun keeps for the processes of a run
PATIENCE_SECONDS = 20.0  # torchrun ends the others of a machine within one
WATCH_SECONDS = 1.0  # between two looks at whether another process has failed
EXIT_CODE_FILE = "VLTRAIN_EXIT_CODE_FILE"  # where `vltrain --gpus` wants to be told the exit code
_PARTED = threading.Event()  # set when this process has left the run in order
WATCHER = "vltrain watches the other processes"  # the name of a thread
PR_SET_PDEATHSIG = 1  # of Linux' prctl: which signal a parent's death sends


def started_by_torchrun() -> bool:
    """Whether this process is one of a run's, the only one even."""
    return "LOCAL_RANK" in os.environ and "WORLD_SIZE" in os.environ


def process_count() -> int:
    """Processes of the run, on all machines."""
    return int(os.environ["WORLD_SIZE"]) if started_by_torchrun() else 1


def local_share() -> tuple[int, int]:
    """Which process this is of those of its machine, and how many they are."""
    if not started_by_torchrun():
        return 0, 1
    return int(os.environ["LOCAL_RANK"]), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


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


def least_of_all(number: int, device: "torch.device") -> int:
    """The least of a number that each process has found; every one of them asks."""
    import torch
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return number
    least = torch.tensor(number, device=device)
    distributed.all_reduce(least, distributed.ReduceOp.MIN)
    return int(least)


def leave_group() -> None:
    """Part from the other processes in order, at the end of a run."""
    if not started_by_torchrun():
        return
    from torch import distributed

    store = run_store() if process_count() > 1 else None
    if store is not None:
        store.set(_left_key(_rank()), "")
    _PARTED.set()
    for thread in threading.enumerate():
        if thread.name == WATCHER:  # an interpreter that ends while it asks the store would abort
            thread.join(PATIENCE_SECONDS)
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
        code: the exit code; of the others that of the first to fail.
        patience_seconds: how long the others wait for torchrun to end them.
    """
    sys.stdout.flush()
    store = run_store()
    first = is_first() if store is None else store.add(_failure_key(), 1) == 1
    if first:
        if store is not None:
            store.set(_failure_key("/code"), str(code))
        _tell_torchrun(message)
        _tell_launcher(code)
        print(f"{message}\nexit code {code}", file=sys.stderr, flush=True)
    else:
        code = _code_of_run(store, code)
        _tell_launcher(code)
        time.sleep(patience_seconds)
    os._exit(code)


def watch_others() -> None:
    """End this process of a run where another has failed or died, though it waits for that one.

    A collective operation on GPUs notices the loss of a process late or never. torchrun sees to
    the processes of its own machine, half a minute later where they do not heed it.
    """
    store = run_store()
    if store is not None and process_count() > 1:
        store.set(_pid_key(_rank()), str(os.getpid()))
        watcher = threading.Thread(
            target=_end_with_others, args=(store,), name=WATCHER, daemon=True
        )
        watcher.start()


def _end_with_others(store: "TCPStore") -> None:
    from torch.distributed import DistError

    pids: dict[int, int] = {}
    try:
        while not store.check([_failure_key()]):
            if _PARTED.wait(WATCH_SECONDS):
                return
            dead = _dead_neighbour(store, pids)
            if dead is not None and store.add(_failure_key(), 1) == 1:
                store.set(_failure_key("/dead"), f"{os.environ.get('GROUP_RANK')}:{dead}")
                store.set(_failure_key("/code"), "1")
        code = _code_of_run(store, 1)
        _say_who_died(store)
    except (DistError, RuntimeError):
        code = 1  # the launcher that keeps the store is gone
    if _PARTED.wait(PATIENCE_SECONDS / 2):  # those that can end in order
        return
    _tell_launcher(code)
    os._exit(code)


def _dead_neighbour(store: "TCPStore", pids: dict[int, int]) -> int | None:
    """The rank of a process of this machine that is gone without a word; None where none is.

    Args:
        store: of the run.
        pids: of this machine's processes by rank, as far as they are known; more are added.
    """
    first = _rank() - int(os.environ.get("LOCAL_RANK", "0"))
    for rank in range(first, first + int(os.environ.get("LOCAL_WORLD_SIZE", "1"))):
        if rank not in pids and store.check([_pid_key(rank)]):
            pids[rank] = int(store.get(_pid_key(rank)))
        # It may have left, or failed aloud, in between: that is asked last.
        if rank in pids and not _is_alive(pids[rank]) and not store.check([_left_key(rank)]):
            return rank
    return None


def _is_alive(pid: int) -> bool:
    import psutil

    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _say_who_died(store: "TCPStore") -> None:
    """Name a process of another machine that died; of its own machine's the launcher tells."""
    if not store.check([_failure_key("/dead")]) or os.environ.get("LOCAL_RANK") != "0":
        return
    machine, _, rank = store.get(_failure_key("/dead")).decode().partition(":")
    if machine != os.environ.get("GROUP_RANK"):
        print(
            f"error: process {rank} of {process_count()} died on machine {machine}, and the run "
            "with it\n  fix: start the same command again on all machines; it resumes",
            file=sys.stderr,
            flush=True,
        )


def _rank() -> int:
    return int(os.environ["RANK"])


def _pid_key(rank: int) -> str:
    return _failure_key(f"/pid/{rank}")


def _left_key(rank: int) -> str:
    return _failure_key(f"/left/{rank}")


def run_store() -> "TCPStore | None":
    """The store that torchrun keeps for the processes of a run; None where it keeps none."""
    from torch.distributed import DistError, TCPStore

    try:
        return TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=5),
        )
    except (DistError, KeyError, RuntimeError):
        return None


def _failure_key(end: str = "") -> str:
    return f"{FAILURE_KEY}/{os.environ.get('TORCHELASTIC_RESTART_COUNT')}{end}"


def _code_of_run(store: "TCPStore | None", code: int) -> int:
    """The exit code of the process that failed first; `code` where it cannot be learned."""
    from torch.distributed import DistError

    try:
        return code if store is None else int(store.get(_failure_key("/code")))
    except (DistError, RuntimeError):
        return code


def _tell_launcher(code: int) -> None:
    """Leave the exit code where `vltrain --gpus` looks for it when it is stopped itself."""
    if EXIT_CODE_FILE in os.environ:
        Path(os.environ[EXIT_CODE_FILE]).write_text(str(code), encoding="utf-8")


def _tell_torchrun(message: str) -> None:
    """Leave the message where torchrun looks for one, for its own report at the end."""
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    get_error_handler().record_exception(RuntimeError(message))
