"""Samples of different lengths -> rows of about the same length, and a dataset of such rows.

A row is several whole samples, one after the other; nothing is cut and nothing padded. How many
rows there are follows from the lengths alone, so every epoch has the same number of steps. Which
samples share a row, and the order of the rows, is a function of seed and epoch: neither workers
nor a resume changes it.
"""

import random
from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any, Protocol

Row = tuple[int, ...]
"""Numbers of the samples of a row, in order."""


class Samples(Protocol):
    """What can be packed: samples by number, whose lengths are known without opening them."""

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens of each sample, image tokens included."""
        ...

    def __getitem__(self, number: int) -> dict[str, Any]: ...


def pack(lengths: Sequence[int], row_tokens: int, *, seed: int, epoch: int) -> list[Row]:
    """Rows that hold each sample once: best fit, longest first.

    Where several samples have the same length, or several rows the same space, chance decides;
    then the rows are shuffled, and the samples in each.

    Args:
        lengths: tokens of each sample.
        row_tokens: how many a row may hold.
        seed, epoch: of the chance.

    Raises:
        ValueError: a sample is longer than a row.
    """
    if lengths and max(lengths) > row_tokens:
        raise ValueError(f"a sample of {max(lengths)} tokens is longer than a row of {row_tokens}")
    chance = random.Random(seed * 1_000_003 + epoch)
    numbers = list(range(len(lengths)))
    chance.shuffle(numbers)
    numbers.sort(key=lambda number: -lengths[number])  # stable: equal lengths stay shuffled
    rows = [list(row) for row in _best_fit(numbers, lengths, row_tokens)]
    for row in rows:
        chance.shuffle(row)
    chance.shuffle(rows)
    return [tuple(row) for row in rows]


def _best_fit(numbers: Sequence[int], lengths: Sequence[int], row_tokens: int) -> list[list[int]]:
    """Put each sample, in the order of `numbers`, into the row where it leaves the least space."""
    rows: list[list[int]] = []
    with_space: dict[int, list[list[int]]] = {}  # rows that still hold so many tokens
    spaces: list[int] = []  # the keys of `with_space`, ascending
    for number in numbers:
        place = bisect_left(spaces, lengths[number])
        if place == len(spaces):
            row: list[int] = []
            rows.append(row)
            space = row_tokens
        else:
            space = spaces[place]
            row = with_space[space].pop()
            if not with_space[space]:
                del with_space[space], spaces[place]
        row.append(number)
        left = space - lengths[number]
        if left not in with_space:
            with_space[left] = []
            insort(spaces, left)
        with_space[left].append(row)
    return rows


class PackedDataset:
    """Rows of samples: a map-style dataset whose keys are rows, not numbers.

    `ds[row]` opens the pictures of a row's samples, in the worker that asks for it.
    """

    def __init__(self, samples: Samples, row_tokens: int) -> None:
        """`row_tokens`: how many tokens a row may hold; no sample has more."""
        self.samples = samples
        self.row_tokens = row_tokens
        self._count = len(pack(samples.lengths, row_tokens, seed=0, epoch=0))

    def __len__(self) -> int:
        """Rows of an epoch."""
        return self._count

    def rows(self, *, seed: int, epoch: int) -> list[Row]:
        """The rows of one epoch, in the order in which they are learned from."""
        return pack(self.samples.lengths, self.row_tokens, seed=seed, epoch=epoch)

    @property
    def fill(self) -> float:
        """The share of the rows' places that hold a token, in (0, 1]."""
        return sum(self.samples.lengths) / (self._count * self.row_tokens)

    def __getitem__(self, row: Row) -> list[dict[str, Any]]:
        """The samples of one row, in order."""
        return [self.samples[number] for number in row]
