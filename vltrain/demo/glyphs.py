"""The demo's signs: scans of handwritten digits, and printed signs that resemble them.

A sign is a small grid of ink coverages. scikit-learn's scans have 8 x 8 cells; printed signs are
drawn large, deformed, reduced to about as few cells, and go through the same enlargement, so that
a model that has read the printed ones is not far from reading the scans.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

DIGITS = tuple("0123456789")
LETTERS = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond")

FONT_FILES = (
    "DejaVuSans.ttf",
    "DejaVuSans-Bold.ttf",
    "DejaVuSans-Oblique.ttf",
    "DejaVuSans-BoldOblique.ttf",
    "DejaVuSansMono.ttf",
    "DejaVuSansMono-Bold.ttf",
    "DejaVuSansMono-Oblique.ttf",
    "DejaVuSerif.ttf",
    "DejaVuSerif-Bold.ttf",
    "DejaVuSerif-Italic.ttf",
    "STIXGeneral.ttf",
    "STIXGeneralBol.ttf",
    "STIXGeneralItalic.ttf",
    "STIXGeneralBolIta.ttf",
    "cmr10.ttf",
    "cmb10.ttf",
    "cmss10.ttf",
    "cmti10.ttf",
    "cmtt10.ttf",
)

DRAWN_SIZE = 96  # pixels of the square on which a printed sign is drawn before it is reduced
BITMAP_CELLS = 4  # a scan's cell counts the inked ones of 4 x 4 bitmap dots
MESH = 4  # quadrilaterals along each side of the deformation


@dataclass(frozen=True)
class Glyph:
    """A sign before it has a size: what it is called and how much ink each cell holds.

    Attributes:
        name: the sign as answers spell it in English: "7", "K", "star".
        cells: float32 [rows, columns], 0 (paper) to 1 (ink), cropped to the inked cells.
    """

    name: str
    cells: NDArray[np.float32]


def scanned_digits() -> list[Glyph]:
    """The 1,797 handwritten digits that scikit-learn ships, in its order."""
    from sklearn.datasets import load_digits

    scans = load_digits()
    return [
        Glyph(str(digit), _crop((cells / 16).astype(np.float32)))
        for cells, digit in zip(scans.images, scans.target, strict=True)
    ]


def printed_glyph(name: str, rng: np.random.Generator) -> Glyph:
    """A printed digit or letter, or a drawn shape, deformed and reduced to few cells.

    Args:
        name: one of DIGITS, LETTERS or SHAPES.
        rng: chooses the font, the deformation, the weight of the stroke and the resolution.
    """
    drawn = _draw_shape(name, rng) if name in SHAPES else _draw_character(name, rng)
    deformed = _deform(_change_weight(drawn, rng), rng)
    return Glyph(name, _crop(_reduce(deformed, rng)))


def enlarge(glyph: Glyph, height: float) -> NDArray[np.float32]:
    """The sign at a size in pixels, smoothly interpolated and cropped to its ink.

    Args:
        glyph: the sign.
        height: pixels that its rows of cells take; the ink may differ by a pixel or two.

    Returns:
        float32 [about height, pixels], coverage 0..1.
    """
    rows, columns = glyph.cells.shape
    scale = height / rows
    padded = Image.fromarray(np.pad(glyph.cells, 1))
    size = (max(1, round((columns + 2) * scale)), max(1, round((rows + 2) * scale)))
    mask = np.asarray(padded.resize(size, Image.Resampling.BICUBIC))
    return _crop(np.clip(mask * 1.2, 0, 1), least=0.3)


def _crop(mask: NDArray[np.float32], least: float = 0.05) -> NDArray[np.float32]:
    """The part of a mask that holds every value above `least`."""
    rows = np.flatnonzero((mask > least).any(axis=1))
    columns = np.flatnonzero((mask > least).any(axis=0))
    return mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


@cache
def _font(file_name: str) -> ImageFont.FreeTypeFont:
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", file_name), 56)


def _draw_character(character: str, rng: np.random.Generator) -> Image.Image:
    """White on black, in a random font, in the middle of the drawing square."""
    drawn = Image.new("L", (DRAWN_SIZE, DRAWN_SIZE))
    font = _font(FONT_FILES[rng.integers(len(FONT_FILES))])
    left, top, right, bottom = font.getbbox(character)
    corner = ((DRAWN_SIZE - right - left) / 2, (DRAWN_SIZE - bottom - top) / 2)
    ImageDraw.Draw(drawn).text(corner, character, fill=255, font=font)
    return drawn


def _draw_shape(name: str, rng: np.random.Generator) -> Image.Image:
    """White on black, filled or as a line, in the middle of the drawing square."""
    drawn = Image.new("L", (DRAWN_SIZE, DRAWN_SIZE))
    corners = _shape_corners(name) * (DRAWN_SIZE * 0.3) + DRAWN_SIZE / 2
    points = [(float(x), float(y)) for x, y in corners]
    pen = ImageDraw.Draw(drawn)
    if name != "cross" and rng.random() < 0.5:
        pen.line([*points, points[0], points[1]], fill=255, width=7, joint="curve")
    else:
        pen.polygon(points, fill=255)
    return drawn


def _shape_corners(name: str) -> NDArray[np.float64]:
    """Corners [n, 2] of a shape around the origin, reaching about 1 from it; y points down."""
    if name == "cross":
        a = 0.3
        outline = [(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a)]
        return np.array(outline + [(-x, -y) for x, y in outline])
    if name == "square":
        return np.array([(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)])
    count = {"circle": 40, "triangle": 3, "star": 10, "diamond": 4}[name]
    angles = np.arange(count) * 2 * np.pi / count - np.pi / 2
    radius = np.where(np.arange(count) % 2, 0.4, 1.0) if name == "star" else np.ones(count)
    squeeze = 0.7 if name == "diamond" else 1.0  # or a turned square would be one
    return np.stack([radius * np.cos(angles) * squeeze, radius * np.sin(angles)], axis=1)


def _change_weight(drawn: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Bolder strokes until enough of the sign's box is ink: the scans' are thick."""
    wanted_share = rng.uniform(0.2, 0.55)
    for _ in range(4):
        if _crop(np.asarray(drawn, dtype=np.float32) / 255, least=0.4).mean() > wanted_share:
            break
        drawn = drawn.filter(ImageFilter.MaxFilter(3))
    return drawn


def _deform(drawn: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Turn, slant, stretch and bend the drawing, as a hand would."""
    steps = np.linspace(-1, 1, MESH + 1)
    grid = np.stack(np.meshgrid(steps, steps), axis=-1)  # [row, column, (x, y)] of the result
    turn, slant = rng.normal(0, 0.16), rng.normal(0, 0.22)
    stretch = np.exp(rng.normal(0, 0.18, size=2))
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    linear = rotation @ np.array([[1.0, slant], [0.0, 1.0]]) @ np.diag(stretch)
    bend = rng.normal(0, rng.uniform(0.0, 0.11), size=grid.shape)
    source = (grid @ linear.T + bend + 1) * DRAWN_SIZE / 2

    step = DRAWN_SIZE // MESH
    mesh = []
    for row in range(MESH):
        for column in range(MESH):
            target = (column * step, row * step, (column + 1) * step, (row + 1) * step)
            corners = (
                source[row, column],
                source[row + 1, column],
                source[row + 1, column + 1],
                source[row, column + 1],
            )
            mesh.append((target, tuple(float(v) for corner in corners for v in corner)))
    return drawn.transform(drawn.size, Image.Transform.MESH, mesh, Image.Resampling.BILINEAR)


def _reduce(drawn: Image.Image, rng: np.random.Generator) -> NDArray[np.float32]:
    """Few cells of coverage, the way the scans were made: a bitmap, its dots counted per cell."""
    ink = _crop(np.asarray(drawn, dtype=np.float32) / 255, least=0.4)
    rows = 8 if rng.random() < 0.7 else int(rng.integers(8, 17))
    width = ink.shape[1] / ink.shape[0] * rng.uniform(0.85, 1.15)
    columns = int(np.clip(round(rows * width), 2, rows * 1.25))
    dots = (columns * BITMAP_CELLS, rows * BITMAP_CELLS)
    bitmap = np.asarray(Image.fromarray(ink).resize(dots, Image.Resampling.BILINEAR)) > 0.45
    counted = bitmap.reshape(rows, BITMAP_CELLS, columns, BITMAP_CELLS).mean(axis=(1, 3))
    noise = rng.normal(0, 0.06, size=counted.shape) * (counted > 0)
    return np.clip(counted + noise, 0, 1).astype(np.float32)
