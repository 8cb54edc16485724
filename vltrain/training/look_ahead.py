"""The batches of a step are read while the GPU is at work on the step before."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import transformers
from torch import Tensor, nn

Batches = list[dict[str, Any]]


@dataclass(frozen=True)
class Ahead:
    """What has been read for the next step."""

    iterator: Iterator[dict[str, Any]]  # of the epoch that it was read from
    read: Batches | Exception
    is_last: bool  # of the epoch

    def take(self) -> Batches:
        """The batches; what went wrong is raised here, where the step before is done."""
        if isinstance(self.read, Exception):
            raise self.read
        return self.read


class LookingAhead(transformers.Trainer):
    """A Trainer that reads in the moment before it waits for the GPU.

    Behind the last backward pass of a step the host asks for its gradient's norm. Until then the
    GPU has work, and what is done before the question costs no time. (DeepSpeed asks for itself
    before; and in an epoch that is resumed in its middle accelerate's copies to the GPU wait.)
    Nothing is sent between processes there: one that cannot read would leave the others waiting.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._ahead: Ahead | None = None
        self._asked: tuple[Iterator[dict[str, Any]], int] | None = None  # for the step in hand
        self._at_end = False  # nothing of the epoch is left behind the step in hand

    def read_batches(self, epoch_iterator: Iterator[dict[str, Any]], count: int) -> Batches:
        """The next batches of an epoch: no more than so many, fewer at its end."""
        return list(islice(epoch_iterator, count))

    def count_step(
        self, batches: Batches, device: torch.device
    ) -> tuple[Batches, Tensor | int | None]:
        """The batches of a step with what its loss is divided by, learned tokens of all processes;
        every one of them asks."""
        return super().get_batch_samples(iter(batches), len(batches), device)

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[Batches, Tensor | int | None]:
        ahead, self._ahead = self._ahead, None
        self._asked = (epoch_iterator, num_batches)
        if ahead is None or ahead.iterator is not epoch_iterator:
            batches = self.read_batches(epoch_iterator, num_batches)
            self._at_end = len(batches) < num_batches
        else:
            batches = ahead.take()
            self._at_end = ahead.is_last
        return self.count_step(batches, device)

    def _get_grad_norm(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor | float | None:
        norm = super()._get_grad_norm(model, *args, **kwargs)
        if self._asked is not None and not self._is_last_step():
            self._look_ahead(*self._asked)
        return norm

    def _is_last_step(self) -> bool:
        """Whether the step in hand is the last of the run, or of its epoch as far as is known."""
        at_end = self._at_end or self.accelerator.gradient_state.end_of_dataloader
        return at_end or self.state.global_step + 1 >= self.state.max_steps

    def _look_ahead(self, iterator: Iterator[dict[str, Any]], count: int) -> None:
        try:
            batches = self.read_batches(iterator, count)
        except Exception as error:  # the next step's: this one is to be finished first
            self._ahead = Ahead(iterator, error, is_last=True)
        else:
            self._ahead = Ahead(iterator, batches, is_last=len(batches) < count)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """As `transformers`; the loader's processes do not outlive the epoch."""
        try:
            super()._run_epoch(*args, **kwargs)
        finally:
            self._ahead = self._asked = None
