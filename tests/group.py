"""Several processes for tests: what torchrun would start, with several runs in one start.

    python -m torch.distributed.run --nproc-per-node 2 tests/group.py RECIPE...

trains one recipe after the other in the same processes. Starting and importing takes most of a
small run's time.
"""

import gc
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]


def start_group(
    processes: int, *words: str | Path, gpus: bool = False, timeout: float = 600
) -> subprocess.CompletedProcess[str]:
    """`torchrun --nproc-per-node PROCESSES WORDS`, run to its end; on the CPU without `gpus`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command.append(f"--nproc-per-node={processes}")
    return subprocess.run(
        [*command, *map(str, words)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=group_environment(gpus=gpus),
    )


def group_environment(*, gpus: bool = False) -> dict[str, str]:
    """The environment of a group: one thread a process, these sources, GPUs only where asked."""
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    hidden = {} if gpus else {"CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **hidden}


def train_all(
    processes: int, recipes: Sequence[Path], *, gpus: bool = False, timeout: float = 600
) -> subprocess.CompletedProcess[str]:
    """Train recipes one after the other in one group of processes; every run has to end well."""
    done = start_group(processes, __file__, *recipes, gpus=gpus, timeout=timeout)
    assert done.returncode == 0, done.stderr[-4000:]
    return done


def main(recipes: Sequence[str]) -> None:
    from vltrain.config import read_resolved
    from vltrain.training.processes import leave_group
    from vltrain.workflows.quiet import quiet_loggers
    from vltrain.workflows.train import train

    quiet_loggers()
    for recipe in recipes:
        train(read_resolved(Path(recipe)))
        gc.collect()  # the engine of one run refers to itself
    leave_group()


if __name__ == "__main__":
    main(sys.argv[1:])
