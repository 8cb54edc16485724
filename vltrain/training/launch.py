"""`--gpus N`: the same command in N processes of this machine, by `torch.distributed.run`."""

import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from vltrain.errors import VltrainError
from vltrain.training.processes import EXIT_CODE_FILE, started_by_torchrun


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


def launch(processes: int, words: Sequence[str]) -> int:
    """Run `vltrain WORDS` in several processes that form one run.

    Args:
        processes: how many; each takes a GPU of its own where there are any.
        words: of the command line, after `vltrain`.

    Returns:
        The exit code: 0, or that of the first process to fail or to stop; 128 + N where signal N
        ended it.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch
    from torch.distributed.run import config_from_args, parse_args

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    # What it reports of a failed process, that process has said itself.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    alone = ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", f"--rdzv-id={uuid.uuid4()}"]
    flags = [*alone, f"--nproc-per-node={processes}", "-m", "vltrain", *words]
    config, command, arguments = config_from_args(parse_args(flags))
    signal.signal(signal.SIGUSR1, _hand_on)
    with tempfile.NamedTemporaryFile() as told:
        os.environ[EXIT_CODE_FILE] = told.name
        try:
            elastic_launch(config, command)(*arguments)
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            if failure.exitcode > 0:
                return failure.exitcode
            print(
                f"error: process {rank} of {processes} was ended by {failure.signal_name()}, "
                "and the run with it\n  fix: start the same command again; it resumes",
                file=sys.stderr,
            )
            return 128 - failure.exitcode
        except SignalException as error:
            # The signal went on to the processes, which stop in order and say their code.
            said = Path(told.name).read_text(encoding="utf-8")
            return int(said) if said else 128 + error.sigval
    return 0


def _hand_on(number: int, _: FrameType | None) -> None:
    """Give a warning to the processes of the run; torchrun would end them half a minute later."""
    import psutil

    for child in psutil.Process().children():
        child.send_signal(number)
