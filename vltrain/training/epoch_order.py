"""The order in which a run shows samples, rows and steps: a function of the epoch alone."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Sampler

from vltrain.data.mixing import Mix
from vltrain.data.ordering import grouped_by_length
from vltrain.data.packing import PackedDataset
from vltrain.data.step_rows import StepRows


class EpochOrder(Sampler[Any]):
    """The keys of a data set in an order that is a function of the epoch alone.

    Every process computes all of it, so a run that resumes goes on with it. An epoch's keys are
    kept in an array, not as a list of Python's numbers.
    """

    def __init__(self, keys_of: Callable[[int], Iterable[Any]], count: int) -> None:
        """`keys_of` gives the keys of an epoch, `count` of them in each."""
        self._keys_of, self._count = keys_of, count
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def keys(self, epoch: int) -> Iterable[Any]:
        """Those of an epoch, whichever is set."""
        return self._keys_of(epoch)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Any]:
        yield from self._keys_of(self.epoch)


def row_order(dataset: PackedDataset, seed: int) -> EpochOrder:
    """The rows of a packed data set, packed and shuffled anew for each epoch."""
    return EpochOrder(lambda epoch: dataset.rows(seed=seed, epoch=epoch), len(dataset))


def step_order(dataset: StepRows, seed: int, mix: Mix | None = None) -> EpochOrder:
    """The shares of steps whose samples come in the order of unpacked ones."""
    samples = sample_order(np.asarray(dataset.samples.lengths), seed, mix=mix)
    return EpochOrder(lambda epoch: dataset.shares(samples.keys(epoch)), len(dataset))


def sample_order(
    lengths: NDArray[np.integer],
    seed: int,
    *,
    mix: Mix | None = None,
    step_samples: int | None = None,
) -> EpochOrder:
    """The samples of an epoch, shuffled anew for each: without a mix as `transformers` does.

    Args:
        lengths: tokens of each sample there is.
        seed: of the chance.
        mix: which of them an epoch shows; None: each once.
        step_samples: samples of one optimizer step, to have neighbours of about the same length
            and little padding; None: in random order.
    """

    def keys_of(epoch: int) -> Iterator[int]:
        if mix is None:
            shown = np.arange(len(lengths), dtype=np.int32)
        else:
            shown = mix.numbers(seed=seed, epoch=epoch)
        if step_samples is None:
            order = _shuffled(len(shown), seed + epoch)
        else:
            order = _shuffled(len(shown), seed * 1_000_003 + epoch)
            order = grouped_by_length(order, lengths[shown], step_samples)
        return map(int, shown[order])

    return EpochOrder(keys_of, len(lengths) if mix is None else len(mix))


def _shuffled(count: int, seed: int) -> NDArray[np.int64]:
    """The numbers below `count` in random order."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).numpy()
