"""Optimizer steps that come whole: one batch of the loader holds all that a process takes of one.

So a step has as many forwards as its samples need, whatever the number of the step before.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from accelerate import Accelerator, DistributedType
from torch import nn

ROWS = "rows"
"""The key of a batch under which the batches of a step are."""


class StepBatches:
    """A collator of the shares of a `StepRows`: under `rows`, one batch for each row."""

    def __init__(self, collate: Callable[[Sequence[Any]], dict[str, Any]]) -> None:
        """`collate`: makes a batch of rows of samples."""
        self.collate = collate

    def __call__(self, shares: Sequence[Sequence[Any]]) -> dict[str, list[dict[str, Any]]]:
        return {ROWS: [self.collate([row]) for share in shares for row in share]}


def in_turn(
    accelerator: Accelerator, model: nn.Module, batches: Sequence[dict[str, Any]]
) -> Iterator[tuple[dict[str, Any], AbstractContextManager]]:
    """The batches of a step, each with the context to go forward and back in.

    Gradients add up, and only behind the last batch are they summed over the processes and the
    engine's step is due.
    """
    for left, batch in zip(range(len(batches) - 1, -1, -1), batches, strict=True):
        accelerator.gradient_state._set_sync_gradients(left == 0)
        # DeepSpeed counts by that flag, and takes no other word.
        by_flag = accelerator.distributed_type == DistributedType.DEEPSPEED
        yield batch, nullcontext() if left == 0 or by_flag else accelerator.no_sync(model)
