"""Samples -> one batch of tensors, padded on the right to the longest of them.

B samples, L tokens of the longest, N pictures of all samples in order, S pixels a side.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vltrain.data.encoding import IGNORE_INDEX


@dataclass(frozen=True)
class Collator:
    """Turns the dicts of a SampleDataset into what a model's forward takes."""

    pad_id: int

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Pad and stack.

        Returns:
            `input_ids`, `attention_mask` and `labels`, int64 [B, L]; `pixel_values`, float
            [N, 3, S, S], only where a sample has a picture. The mask follows the lengths, not
            the ids: a pad token that somebody's text holds stays visible.
        """
        longest = max(len(sample["input_ids"]) for sample in samples)
        batch = {
            "input_ids": _padded([sample["input_ids"] for sample in samples], longest, self.pad_id),
            "attention_mask": _padded([[1] * len(s["input_ids"]) for s in samples], longest, 0),
            "labels": _padded([sample["labels"] for sample in samples], longest, IGNORE_INDEX),
        }
        pixels = [s["pixel_values"] for s in samples if s.get("pixel_values") is not None]
        if pixels:
            batch["pixel_values"] = torch.cat(pixels)
        return batch


def _padded(rows: Sequence[Sequence[int]], length: int, filler: int) -> Tensor:
    """Rows of different lengths as int64 [B, L]."""
    filled = [[*row, *[filler] * (length - len(row))] for row in rows]
    return torch.tensor(filled, dtype=torch.long)
