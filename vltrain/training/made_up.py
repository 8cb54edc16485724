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


def spread_lengths(shortest: int, longest: int, count: int) -> np.ndarray:
    """int32 [count]: tokens of samples, drawn evenly on a logarithmic scale, the same every time.

    Both ends are among what may be drawn.
    """
    drawn = np.random.default_rng(0).uniform(np.log(shortest), np.log(longest + 1), count)
    return np.clip(np.exp(drawn).astype(np.int32), shortest, longest)


class MadeUpSamples(Dataset[dict[str, Any]]):
    """Samples of a picture and then random text, of which every token is learned."""

    def __init__(
        self,
        picture_ids: tuple[int, ...],
        lengths: np.ndarray,
        picture: Callable[[], dict[str, Any]],
    ) -> None:
        """Nothing is opened yet.

        Args:
            picture_ids: marks and image tokens of a picture; text has lower ids.
            lengths: int32 [samples], tokens of each, those of the picture included.
            picture: reads it, for each sample anew: what a sample has of its pictures.
        """
        self.picture_ids, self.picture = picture_ids, picture
        self.lengths = lengths
        self.learned_tokens = lengths - np.int32(len(picture_ids))
        self.image_counts = np.ones_like(lengths)

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
