"""How many of the machine's cores a process may use."""

import os


def usable_cores() -> int:
    """The machine's cores, or those of them that Slurm, `taskset` or a container's cpuset leaves
    this process."""
    if hasattr(os, "sched_getaffinity"):  # not on a Mac
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
