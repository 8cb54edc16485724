"""Steps whose loss or gradient is not a finite number, and the records that they came from."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from vltrain.errors import NotFiniteError

RECORDS = "records"
"""The key of a batch under which the names of its records are; no model's to see."""

NAMES_SHOWN = 8


class NamedBatches:
    """A collator whose batches tell, under `records`, which records they are of."""

    def __init__(self, collate: Callable[[Sequence[Any]], dict[str, Any]]) -> None:
        """`collate`: makes a batch of samples, or of rows of samples."""
        self.collate = collate

    def __call__(self, samples: Sequence[Any]) -> dict[str, Any]:
        return {**self.collate(samples), RECORDS: list(_names(samples))}


def _names(samples: Iterable[Any]) -> Iterator[str]:
    for sample in samples:
        if isinstance(sample, dict):
            yield from [sample["record"]] if "record" in sample else []  # else it was dropped
        else:
            yield from _names(sample)


class StepWatch:
    """What the step in hand has computed so far, and how many bad steps came before it.

    Nothing waits for the GPU until `is_bad` is asked, once a step.
    """

    def __init__(self, stop_after: int) -> None:
        """`stop_after`: how many bad steps in a row end a run."""
        self.stop_after = stop_after
        self.in_a_row = 0
        self._batches: list[tuple[Sequence[str], Tensor]] = []

    def saw(self, records: Sequence[str], loss: Tensor) -> None:
        """Take in one batch of the step: its records' names, and its loss."""
        self._batches.append((records, torch.isfinite(loss.detach()).all()))

    def is_bad(self, norm: Tensor | float | None) -> bool:
        """Whether a loss of this step, or its gradient's norm where one counts, is not finite."""
        finite = [bool(fine) for _, fine in self._batches]
        return not all(finite) or (norm is not None and not torch.isfinite(torch.as_tensor(norm)))

    def suspects(self) -> list[str]:
        """The records of the batches whose loss is not finite; of all where each loss is."""
        bad = [records for records, fine in self._batches if not fine]
        batches = bad or [records for records, _ in self._batches]
        return [record for records in batches for record in records]

    def step_done(self, *, bad: bool) -> None:
        """Count the step, and look at the next one."""
        self.in_a_row = self.in_a_row + 1 if bad else 0
        self._batches = []


def not_finite_error(step: int, in_a_row: int, records: Iterable[str]) -> NotFiniteError:
    """The error of a run that ends here.

    Args:
        step: the one that was to be taken.
        in_a_row: how many bad ones there were, with this one.
        records: the names of those that it learned from.
    """
    times = "" if in_a_row == 1 else f", {in_a_row} steps in a row"
    return NotFiniteError.at(
        f"step {step}",
        what=f"the loss or its gradient is NaN or infinite{times}; it came of {listed(records)}",
        fix="look at these records, lower trainer.learning_rate, or take dtype: bf16 for fp16; "
        "the checkpoints of before are kept",
    )


def listed(records: Iterable[str]) -> str:
    """The first few names, and how many there are beside."""
    names = list(dict.fromkeys(records))
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
