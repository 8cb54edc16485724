"""Samples that are made up, to measure steps of training without data."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from vltrain.data.encoding import IGNORE_INDEX

PHOTO_SIDES = (4000, 3000)  # pixels, 12 megapixels as of a telephone
COARSE_SIDES = (160, 120)


class MadeUpSamples(Dataset[dict[str, Any]]):
    """Samples of one length: a picture, then random text of which every token is learned."""

    def __init__(
        self,
        picture_ids: tuple[int, ...],
        tokens: int,
        count: int,
        picture: Callable[[], dict[str, Any]],
    ) -> None:
        """Nothing is opened yet.

        Args:
            picture_ids: marks and image tokens of a picture; text has lower ids.
            tokens: of each sample, those of the picture included.
            count: of samples.
            picture: reads it, for each sample anew: what a sample has of its pictures.
        """
        self.picture_ids, self.picture = picture_ids, picture
        text = tokens - len(picture_ids)
        self.lengths = np.full(count, tokens, np.int32)
        self.learned_tokens = np.full(count, text, np.int32)
        self.image_counts = np.full(count, 1, np.int32)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """One sample, as a `SampleDataset` gives it."""
        generator = torch.Generator().manual_seed(number)
        size = (int(self.learned_tokens[number]),)
        text = torch.randint(0, min(self.picture_ids), size, generator=generator).tolist()
        return {
            "input_ids": [*self.picture_ids, *text],
            "labels": [IGNORE_INDEX] * len(self.picture_ids) + text,
            **self.picture(),
        }


def write_photo(path: Path) -> None:
    """A JPEG of 12 megapixels that takes as long to decode as a photo: shapes and grain."""
    width, height = PHOTO_SIDES
    chance = np.random.default_rng(0)
    coarse = chance.integers(0, 256, (*reversed(COARSE_SIDES), 3), np.uint8)
    shapes = Image.fromarray(coarse).resize(PHOTO_SIDES, Image.Resampling.BICUBIC)
    grain = chance.integers(-8, 9, (height, width, 1), np.int16)
    pixels = np.clip(np.asarray(shapes, np.int16) + grain, 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(path, quality=90)
