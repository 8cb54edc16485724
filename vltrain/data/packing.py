"""Samples of different lengths -> rows of about the same length, and a dataset of such rows.

A row is several whole samples, one after the other; nothing is cut and nothing padded. How many
rows there are follows from the lengths alone, so every epoch has the same number of steps. Which
samples share a row, and the order of the rows, is a function of seed and epoch: neither workers
nor a resume changes it.

Numbers are kept in arrays, and samples of one length are placed together: a million of them take
about a second.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vltrain.data.ordering import chance_of

Row = tuple[int, ...]
"""Numbers of the samples of a row, in order."""


class Samples(Protocol):
    """What can be packed: samples by number, whose lengths are known without opening them."""

    @property
    def lengths(self) -> ArrayLike:
        """Tokens of each sample, image tokens included."""
        ...

    def __getitem__(self, number: int) -> dict[str, Any]: ...


class Rows(Sequence[Row]):
    """The rows of an epoch, in the order in which they are learned from."""

    def __init__(self, numbers: NDArray[np.integer], begins: NDArray[np.integer]) -> None:
        """`numbers` of the samples of all rows; `begins`: where each row does, and the end."""
        self._numbers = numbers
        self._begins = begins

    def __len__(self) -> int:
        return len(self._begins) - 1

    def __getitem__(self, place: int) -> Row:
        """The row at a place from 0; raises IndexError behind the last."""
        if not 0 <= place < len(self):
            raise IndexError(place)
        return tuple(self._numbers[self._begins[place] : self._begins[place + 1]].tolist())

    def renamed(self, names: NDArray[np.integer]) -> "Rows":
        """The same rows, with the name of each number in its place."""
        return Rows(names[self._numbers], self._begins)


def pack(lengths: ArrayLike, row_tokens: int, *, seed: int, epoch: int) -> Rows:
    """Rows that hold each sample once: best fit, longest first.

    Where several samples have the same length, chance decides; then the rows are shuffled, and
    the samples in each.

    Args:
        lengths: tokens of each sample.
        row_tokens: how many a row may hold.
        seed, epoch: of the chance.

    Raises:
        ValueError: a sample is longer than a row.
    """
    tokens = np.asarray(lengths, dtype=np.int64)
    if not len(tokens):
        return Rows(np.empty(0, np.int64), np.zeros(1, np.int64))
    if tokens.max() > row_tokens:
        raise ValueError(f"a sample of {tokens.max()} tokens is longer than a row of {row_tokens}")
    chance = chance_of(seed, epoch)
    numbers = chance.permutation(len(tokens))
    numbers = numbers[np.argsort(-tokens[numbers], kind="stable")]  # equal lengths stay shuffled
    row_of = _best_fit(tokens[numbers], row_tokens)
    shuffle = chance.permutation(len(tokens))  # the samples in each row
    numbers, row_of = numbers[shuffle], row_of[shuffle]
    places = chance.permutation(row_of.max() + 1)[row_of]  # and the rows
    begins = np.concatenate(([0], np.cumsum(np.bincount(places))))
    return Rows(numbers[np.argsort(places, kind="stable")], begins)


def _best_fit(lengths: NDArray[np.int64], row_tokens: int) -> NDArray[np.int64]:
    """The row of each sample: each goes, in turn, where it leaves the least space.

    While samples of one length follow each other, the row with the least space that takes one
    goes on taking them until it takes no more: its space only shrinks. So all rows of one space
    are filled at once.

    Args:
        lengths: tokens, descending.
        row_tokens: how many a row may hold.
    """
    row_of = np.empty(len(lengths), np.int64)
    spaces = _Spaces(row_tokens)
    values, counts = np.unique(-lengths, return_counts=True)
    begin = 0
    for length, count in zip((-values).tolist(), counts.tolist(), strict=True):
        end = begin + count
        while begin < end:
            begin += spaces.fill(length, row_of[begin:end])
    return row_of


class _Spaces:
    """The rows that are open, by the tokens that they still take."""

    def __init__(self, row_tokens: int) -> None:
        self.row_tokens = row_tokens
        self._count = 0  # rows that have been opened
        self._rows: dict[int, list[NDArray[np.int64]]] = {}  # stacks of rows that take so many
        self._ascending: list[int] = []  # the keys of `_rows`

    def fill(self, length: int, row_of: NDArray[np.int64]) -> int:
        """Give samples of one length to the rows of one space; return how many have got a row.

        Args:
            length: tokens of each sample.
            row_of: where to write their rows; the first of them are written.
        """
        place = bisect_left(self._ascending, length)
        is_new = place == len(self._ascending)
        space = self.row_tokens if is_new else self._ascending[place]
        each = space // length  # samples that a row of this space takes
        wanted = -(-len(row_of) // each)
        rows = self._open(wanted) if is_new else self._take(space, wanted)
        filled = min(len(row_of), len(rows) * each)
        row_of[:filled] = np.repeat(rows, each)[:filled]
        last = filled - (len(rows) - 1) * each  # samples in the last of the rows
        self._put(space - each * length, rows[:-1])
        self._put(space - last * length, rows[-1:])
        return filled

    def _open(self, count: int) -> NDArray[np.int64]:
        self._count += count
        return np.arange(self._count - count, self._count)

    def _take(self, space: int, count: int) -> NDArray[np.int64]:
        """Take at most `count` rows of one space from the top of their stack."""
        stack = self._rows[space]
        rows = stack.pop()
        if len(rows) > count:
            stack.append(rows[count:])
            rows = rows[:count]
        if not stack:
            del self._rows[space]
            self._ascending.remove(space)
        return rows

    def _put(self, space: int, rows: NDArray[np.int64]) -> None:
        if not len(rows) or not space:
            return
        if space not in self._rows:
            self._rows[space] = []
            insort(self._ascending, space)
        self._rows[space].append(rows)


class PackedDataset:
    """Rows of samples: a map-style dataset whose keys are rows, not numbers.

    `ds[row]` opens the pictures of a row's samples, in the worker that asks for it.
    """

    def __init__(
        self, samples: Samples, row_tokens: int, numbers: NDArray[np.integer] | None = None
    ) -> None:
        """Pack some samples.

        Args:
            samples: none has more than `row_tokens` tokens.
            row_tokens: how many tokens a row may hold.
            numbers: of the samples that an epoch shows, some perhaps more than once; None: each
                of them once.
        """
        self.samples = samples
        self.row_tokens = row_tokens
        self._numbers = numbers
        lengths = np.asarray(samples.lengths)
        self._lengths = lengths if numbers is None else lengths[numbers]
        self._count = len(pack(self._lengths, row_tokens, seed=0, epoch=0))

    def __len__(self) -> int:
        """Rows of an epoch."""
        return self._count

    def rows(self, *, seed: int, epoch: int) -> Rows:
        """The rows of one epoch, in the order in which they are learned from."""
        rows = pack(self._lengths, self.row_tokens, seed=seed, epoch=epoch)
        return rows if self._numbers is None else rows.renamed(self._numbers)

    @property
    def fill(self) -> float:
        """The share of the rows' places that hold a token, in (0, 1]."""
        return int(self._lengths.sum()) / (self._count * self.row_tokens)

    def __getitem__(self, row: Row) -> list[dict[str, Any]]:
        """The samples of one row, in order."""
        return [self.samples[number] for number in row]
