"""Samples -> one batch of tensors, padded on the right or packed one after the other.

B samples, L tokens of the longest, T tokens of all, N pictures of all samples in order, S pixels
a side.

Of pictures whose features are kept, a batch has these in the place of pixels, under the name that
the model gives them: float [K, …], K of the N, and `pixel_values` has the others'. Where there are
both, `picture_order`, int64 [N], has for each picture its place among the K and the others behind.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor

from vltrain.data.dataset import DROPPED, FEATURES
from vltrain.data.encoding import IGNORE_INDEX

NOTHING: dict[str, Any] = {"input_ids": [0], "labels": [IGNORE_INDEX]}
"""A sample of which nothing is learned: a token of any vocabulary."""


@dataclass(frozen=True)
class Collator:
    """Turns the dicts of a SampleDataset into what a model's forward takes."""

    pad_id: int

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Pad and stack.

        Returns:
            `input_ids`, `attention_mask` and `labels`, int64 [B, L]; `learned_places`, int64,
            where in B x L a token stands whose next one is learned; `pixel_values`, float
            [N, 3, S, S], only where a sample has a picture. The mask follows the lengths, not
            the ids: a pad token that somebody's text holds stays visible. `dropped`, list of
            str, only where samples are dropped: why, for each.
        """
        samples, told = _shown(samples)
        longest = max(len(sample["input_ids"]) for sample in samples)
        labels = _padded([sample["labels"] for sample in samples], longest, IGNORE_INDEX)
        return {
            "input_ids": _padded([sample["input_ids"] for sample in samples], longest, self.pad_id),
            "attention_mask": _padded([[1] * len(s["input_ids"]) for s in samples], longest, 0),
            "labels": labels,
            "learned_places": _places_before_learned(labels),
            **_pictures(samples),
            **told,
        }


def collate_rows(rows: Iterable[Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """Lay the samples of all rows of a PackedDataset one after the other, without padding.

    The names of the boundaries are those that transformers gives them, so that they reach the
    attention of any of its models.

    Returns:
        `input_ids`, `labels` and `position_ids`, int64 [1, T]; positions count from 0 in each
        sample. The first label of each sample is hidden: the token before it is another
        sample's. `learned_places`: as for `Collator`. `cu_seq_lens_q` and `cu_seq_lens_k`, int32
        [B + 1]: where each sample begins, and T. `max_length_q` and `max_length_k`: int, tokens
        of the longest. `pixel_values`, float [N, 3, S, S], only where a sample has a picture.
        `dropped`: as for `Collator`. No `attention_mask`: there is nothing to hide, and
        transformers reads the boundaries from the positions only where none is given.
    """
    samples, told = _shown(list(chain.from_iterable(rows)))
    lengths = [len(sample["input_ids"]) for sample in samples]
    boundaries = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    labels = _joined([IGNORE_INDEX, *sample["labels"][1:]] for sample in samples)
    return {
        "input_ids": _joined(sample["input_ids"] for sample in samples),
        "labels": labels,
        "learned_places": _places_before_learned(labels),
        "position_ids": _joined(range(length) for length in lengths),
        "cu_seq_lens_q": boundaries,
        "cu_seq_lens_k": boundaries,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
        **_pictures(samples),
        **told,
    }


def _shown(
    samples: Sequence[dict[str, Any]],
) -> tuple[Sequence[dict[str, Any]], dict[str, list[str]]]:
    """The samples that are there, at least one, and what a batch tells of the dropped ones."""
    dropped = [sample[DROPPED] for sample in samples if DROPPED in sample]
    shown = [sample for sample in samples if DROPPED not in sample] or [NOTHING]
    return shown, {DROPPED: dropped} if dropped else {}


def _padded(rows: Sequence[Sequence[int]], length: int, filler: int) -> Tensor:
    """Rows of different lengths as int64 [B, L]."""
    filled = [[*row, *[filler] * (length - len(row))] for row in rows]
    return torch.tensor(filled, dtype=torch.long)


def _joined(parts: Iterable[Iterable[int]]) -> Tensor:
    """Parts one after the other as int64 [1, T]."""
    return torch.tensor([list(chain.from_iterable(parts))], dtype=torch.long)


def _pictures(samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """The pictures of all samples in order, where there is any; see the module."""
    pixels = [s["pixel_values"] for s in samples if s.get("pixel_values") is not None]
    inputs = {"pixel_values": torch.cat(pixels)} if pixels else {}
    given = [sample[FEATURES] for sample in samples if FEATURES in sample]
    features = [picture for _, pictures in given for picture in pictures]
    kept = [picture for picture in features if picture is not None]
    if kept:
        inputs[given[0][0]] = torch.stack(kept)
    if kept and pixels:
        inputs["picture_order"] = _order([picture is not None for picture in features], len(kept))
    return inputs


def _order(is_kept: Sequence[bool], kept: int) -> Tensor:
    """For each picture its place among all whose features are kept, then all others."""
    ahead, behind = iter(range(kept)), iter(range(kept, len(is_kept)))
    return torch.tensor([next(ahead if one else behind) for one in is_kept])


def _places_before_learned(labels: Tensor) -> Tensor:
    """Where in B x L a token stands whose next one is learned: int64, ascending."""
    rows, columns = (labels[:, 1:] != IGNORE_INDEX).nonzero(as_tuple=True)
    return rows * labels.size(1) + columns
