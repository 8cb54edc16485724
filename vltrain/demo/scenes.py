"""Pictures of one to three signs on a coloured canvas, and where each sign is."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vltrain.demo.glyphs import Glyph, enlarge

CANVAS_SIZE = 112  # pixels a side; what the demo's model sees, so nothing is resampled
BOX_SCALE = 1000  # boxes count thousandths of the picture's side, from 0 to 999
MARGIN = 3  # pixels left free at the canvas' border
GAP = 4  # pixels left free between neighbours, at least
HEIGHTS = {1: (28, 64), 2: (28, 54), 3: (26, 42)}  # pixels, by the number of signs
LEAST_CONTRAST = 80  # difference of luminance (0..255) between ink and canvas
LUMINANCE = np.array([0.299, 0.587, 0.114])

IntBox = tuple[int, int, int, int]


@dataclass(frozen=True)
class PlacedGlyph:
    """A sign in a picture: its name and its box (x1, y1, x2, y2) on the 0..999 scale."""

    name: str
    box: IntBox


@dataclass(frozen=True)
class Scene:
    """A picture and its signs from left to right."""

    image: Image.Image
    glyphs: tuple[PlacedGlyph, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The signs' names from left to right."""
        return tuple(glyph.name for glyph in self.glyphs)


def compose(glyphs: Sequence[Glyph], rng: np.random.Generator) -> Scene:
    """Paint one to three signs side by side, at random sizes, places and colours.

    No two signs share a column of pixels, so "from left to right" has one meaning.
    """
    masks = [
        enlarge(glyph, height) for glyph, height in zip(glyphs, _heights(glyphs, rng), strict=True)
    ]
    canvas, ink = _colours(rng)
    free = CANVAS_SIZE - 2 * MARGIN - sum(mask.shape[1] for mask in masks) - GAP * len(masks[1:])
    spaces = np.floor(rng.dirichlet(np.ones(len(masks) + 1)) * max(0, free)).astype(int)
    placed = []
    left = MARGIN
    for glyph, mask, space in zip(glyphs, masks, spaces[:-1], strict=True):
        left += int(space)
        height, width = mask.shape
        top = int(rng.integers(MARGIN, CANVAS_SIZE - MARGIN - height + 1))
        region = canvas[top : top + height, left : left + width]
        region += mask[:, :, None] * (ink - region)
        placed.append(PlacedGlyph(glyph.name, _box(left, top, left + width, top + height)))
        left += width + GAP
    image = Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))
    return Scene(image, tuple(placed))


def _heights(glyphs: Sequence[Glyph], rng: np.random.Generator) -> list[float]:
    """Pixels for each sign's height, chosen so that all of them fit side by side."""
    low, high = HEIGHTS[len(glyphs)]
    common = rng.uniform(low, high)
    heights = np.clip(common * rng.uniform(0.8, 1.25, size=len(glyphs)), low, high)
    # Interpolation spreads ink by up to half a cell on either side.
    aspects = [(g.cells.shape[1] + 1) / g.cells.shape[0] for g in glyphs]
    room = CANVAS_SIZE - 2 * MARGIN - GAP * (len(glyphs) - 1)
    shrink = min(1.0, room / float(heights @ np.array(aspects)))
    return [float(height * shrink) for height in heights]


def _colours(rng: np.random.Generator) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """A canvas with a slight gradient, float32 [112, 112, 3], and an ink darker than it."""
    paper, ink = rng.uniform(0, 255, size=(2, 3))
    while LUMINANCE @ (paper - ink) < LEAST_CONTRAST:
        paper, ink = rng.uniform(0, 255, size=(2, 3))
    steps = np.linspace(-1, 1, CANVAS_SIZE, dtype=np.float32)
    across, down = rng.uniform(-12, 12, size=2)
    slope = across * steps[None, :] + down * steps[:, None]
    canvas = (paper[None, None, :] + slope[:, :, None]).astype(np.float32)
    return canvas, ink.astype(np.float32)


def _box(left: int, top: int, right: int, bottom: int) -> IntBox:
    """Pixels to the 0..999 scale; right and bottom are the first pixels outside."""
    x1, y1, x2, y2 = (round(v * BOX_SCALE / CANVAS_SIZE) for v in (left, top, right, bottom))
    return x1, y1, x2, y2
