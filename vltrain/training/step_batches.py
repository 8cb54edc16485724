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

    Gradients add up, and behind the last batch the engine's step is due. Only there are they summed
    over the processes, but under FSDP2: it would hold all of them whole, in float32, until then.
    """
    for left, batch in zip(range(len(batches) - 1, -1, -1), batches, strict=True):
        accelerator.gradient_state._set_sync_gradients(left == 0)
        # DeepSpeed counts by that flag, and takes no other word.
        shares = accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP)
        yield batch, nullcontext() if left == 0 or shares else accelerator.no_sync(model)
