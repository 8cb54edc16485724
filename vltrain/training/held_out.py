"""Evaluation by several processes that measures what one would: each sample once, by its tokens."""

import math
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import Dataset

from vltrain.data.collation import NOTHING
from vltrain.data.dataset import SampleDataset
from vltrain.data.encoding import IGNORE_INDEX


class HeldOutShare(Dataset):
    """The samples that one process evaluates: all processes have as many, and no sample twice.

    Where the samples do not divide evenly, what is missing is filled up with an item of which
    nothing is learned: processes that hold shares of the weights wait for each other in every
    batch. Samples go by length, the longest first, so that a batch has little padding and the
    batches of a moment are alike on all processes.
    """

    def __init__(self, samples: SampleDataset, process: int, processes: int) -> None:
        """The share of process number `process` of `processes`."""
        self._samples = samples
        order = np.argsort(-samples.lengths.astype(np.int64), kind="stable")
        self._numbers = order[process::processes]
        self._count = -(-len(samples) // processes)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, place: int) -> dict[str, Any]:
        return self._samples[self._numbers[place]] if place < len(self._numbers) else NOTHING


class LossSum:
    """The loss of learned tokens, summed. Tensors stay on their device until they are read."""

    def __init__(self) -> None:
        self._loss: float | Tensor = 0.0
        self._tokens: int | Tensor = 0

    def add(self, loss: Tensor, labels: Tensor) -> None:
        """Take in a batch: the sum of its tokens' losses, and its labels, int64 [B, L].

        Nothing predicts a row's first token.
        """
        self._loss = self._loss + loss.double()
        self._tokens = self._tokens + (labels[:, 1:] != IGNORE_INDEX).sum()

    def mean_of_all(self, accelerator: Accelerator) -> float:
        """The mean over the learned tokens of all processes, each of which asks; not a number
        where there is none."""
        own = torch.tensor([float(self._loss), float(self._tokens)], dtype=torch.float64)
        loss, tokens = accelerator.reduce(own.to(accelerator.device)).tolist()
        return loss / tokens if tokens else math.nan
