"""What the processes of a run decide together: all of them ask, all get the same answer."""

from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
from torch import distributed

T = TypeVar("T")


def several_processes() -> bool:
    """Whether this process is one of several that know of each other."""
    return (
        distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
    )


def any_process(flags: Sequence[bool], device: torch.device) -> list[bool]:
    """For each flag, whether it is set in any process.

    Args:
        flags: of this process; as many in each.
        device: where the processes exchange tensors.
    """
    if not several_processes():
        return list(flags)
    votes = torch.tensor(flags, dtype=torch.int32, device=device)
    distributed.all_reduce(votes, op=distributed.ReduceOp.MAX)
    return [bool(vote) for vote in votes.tolist()]


def from_all(values: Iterable[T]) -> list[T]:
    """The values of all processes, those of the first in front."""
    own = list(values)
    if not several_processes():
        return own
    gathered: list[list[T]] = [[] for _ in range(distributed.get_world_size())]
    distributed.all_gather_object(gathered, own)
    return [value for part in gathered for value in part]
