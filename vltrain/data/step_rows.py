"""The samples of each optimizer step, packed into as few rows as a budget of tokens allows.

A step learns from the samples that it would have learned from unpacked: the next so many of the
epoch's order. Only how they lie side by side is decided here, by the budget and the number of
processes; each process has as many rows in a step as the others, some of them perhaps empty.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np

from vltrain.data.packing import Row, Samples

StepShare = tuple[Row, ...]
"""What one process takes of a step: rows of numbers of samples."""


def spread(lengths: Sequence[int], bins: int) -> list[list[int]]:
    """Places of samples in bins of about as many tokens: the longest first, each where least is.

    Args:
        lengths: tokens of each sample.
        bins: how many; some stay empty where there are fewer samples.

    Returns:
        For each bin the places of its samples, ascending.
    """
    filled = [0] * bins
    places: list[list[int]] = [[] for _ in range(bins)]
    for place in sorted(range(len(lengths)), key=lambda place: (-lengths[place], place)):
        least = filled.index(min(filled))
        filled[least] += lengths[place]
        places[least].append(place)
    return [sorted(held) for held in places]


def split_step(lengths: Sequence[int], row_tokens: int, processes: int) -> list[list[list[int]]]:
    """A step's samples in rows, for each process.

    Args:
        lengths: tokens of each sample of the step.
        row_tokens: how many a row may hold.
        processes: that share the step.

    Returns:
        For each process the same number of rows, each the places of its samples, ascending.

    Raises:
        ValueError: a sample is longer than a row.
    """
    if max(lengths) > row_tokens:
        raise ValueError(f"a sample of {max(lengths)} tokens is longer than a row of {row_tokens}")
    shares = spread(lengths, processes)
    tokens = [[lengths[place] for place in share] for share in shares]
    count = max(-(-sum(each) // row_tokens) for each in tokens)
    while any(_fullest(each, count) > row_tokens for each in tokens):
        count += 1
    return [
        [[share[place] for place in row] for row in spread(each, count)]
        for share, each in zip(shares, tokens, strict=True)
    ]


def _fullest(lengths: Sequence[int], rows: int) -> int:
    return max(sum(lengths[place] for place in row) for row in spread(lengths, rows))


class StepRows:
    """Optimizer steps of packed samples: a map-style dataset whose keys are shares of steps.

    `ds[share]` opens the pictures of its samples, in the worker that asks for it.
    """

    def __init__(
        self,
        samples: Samples,
        *,
        step_samples: int,
        row_tokens: int,
        epoch_samples: int | None = None,
        processes: int = 1,
    ) -> None:
        """Steps over some samples.

        Args:
            samples: none has more than `row_tokens` tokens.
            step_samples: samples of a step, of all processes together.
            row_tokens: how many tokens a row may hold.
            epoch_samples: how many samples an epoch shows; None: each of them once.
            processes: that share each step.
        """
        self.samples = samples
        self.step_samples = step_samples
        self.row_tokens = row_tokens
        self.processes = processes
        self._lengths = np.asarray(samples.lengths)
        self._epoch_samples = len(self._lengths) if epoch_samples is None else epoch_samples

    def of_length(self, row_tokens: int) -> "StepRows":
        """The same steps, in rows that may hold so many tokens."""
        return StepRows(
            self.samples,
            step_samples=self.step_samples,
            row_tokens=row_tokens,
            epoch_samples=self._epoch_samples,
            processes=self.processes,
        )

    @property
    def steps(self) -> int:
        """Optimizer steps of an epoch."""
        return -(-self._epoch_samples // self.step_samples)

    def __len__(self) -> int:
        """Shares of an epoch."""
        return self.steps * self.processes

    def shares(self, order: Iterable[int]) -> Iterator[StepShare]:
        """The shares of an epoch's steps, those of a step after each other, process by process.

        Args:
            order: numbers of the epoch's samples.
        """
        numbers_left = iter(order)
        while numbers := list(islice(numbers_left, self.step_samples)):
            lengths = self._lengths[numbers].tolist()
            for rows in split_step(lengths, self.row_tokens, self.processes):
                yield tuple(tuple(numbers[place] for place in row) for row in rows)

    def __getitem__(self, share: StepShare) -> list[list[dict[str, Any]]]:
        """The samples of one share, row by row."""
        return [[self.samples[number] for number in row] for row in share]
