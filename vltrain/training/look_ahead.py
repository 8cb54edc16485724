"""The batches of a step are fetched while the GPU is at work on the step before."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

Fetched = tuple[list[dict[str, Any]], Tensor | int | None]
"""The batches of a step, and what its loss is divided by: learned tokens, of all processes."""


@dataclass(frozen=True)
class Ahead:
    """What is there of the next step."""

    iterator: Iterator[dict[str, Any]]  # that it was fetched from
    fetched: Fetched | Exception

    def take(self) -> Fetched:
        """The batches; what went wrong is raised here, where the step before is done."""
        if isinstance(self.fetched, Exception):
            raise self.fetched
        return self.fetched


class LookingAhead(transformers.Trainer):
    """A Trainer whose host, in every step, has a moment left before it waits for the GPU.

    Behind the last backward pass of a step the host asks for its gradient's norm. Until then the
    GPU has work, and what is done before the question costs no time.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._ahead: Ahead | None = None
        self._asked: tuple[Iterator[dict[str, Any]], int, torch.device] | None = None

    def fetch_step(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> Fetched:
        """The next batches of an epoch: no more than so many, fewer at its end."""
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> Fetched:
        ahead, self._ahead = self._ahead, None
        self._asked = (epoch_iterator, num_batches, device)
        if ahead is not None and ahead.iterator is epoch_iterator:
            return ahead.take()
        return self.fetch_step(epoch_iterator, num_batches, device)

    def _get_grad_norm(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor | float | None:
        norm = super()._get_grad_norm(model, *args, **kwargs)
        if self._asked is not None and not self._is_last_step():
            self._ahead = Ahead(self._asked[0], self._try_fetch())
        return norm

    def _is_last_step(self) -> bool:
        """Whether the step in hand is the last of the run, or of its epoch as far as is known."""
        at_end = self.accelerator.gradient_state.end_of_dataloader
        return at_end or self.state.global_step + 1 >= self.state.max_steps

    def _try_fetch(self) -> Fetched | Exception:
        try:
            return self.fetch_step(*self._asked)
        except Exception as error:  # the next step's: this one is to be finished first
            return error
