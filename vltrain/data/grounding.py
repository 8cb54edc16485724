"""Boxes in text: `<ref>the cat</ref><box>(x1,y1),(x2,y2)</box>`, read, written and drawn.

Coordinates are whole numbers on a grid of 1000 x 1000 laid over the picture, origin at the top
left: [0, 1000) in both directions, whatever the picture's size. `grid_box` goes from pixels to
the grid and `in_pixels` back.
"""

import logging
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from vltrain.data.faults import Fault, error_of
from vltrain.data.markup import TAG

logger = logging.getLogger(__name__)

GRID = 1000
_POINT = r"\s*\(\s*(-?\d{1,9})\s*,\s*(-?\d{1,9})\s*\)\s*"
_BOX = re.compile(f"{_POINT},{_POINT}")
_QUAD = re.compile(",".join([_POINT] * 4))
_NO_TAG = r"(?:(?!</?(?:ref|box|quad)>).)*"
_MARKUP = re.compile(
    f"<ref>(?P<ref>{_NO_TAG})</ref>|<(?P<shape>box|quad)>(?P<inside>{_NO_TAG})</(?P=shape)>",
    re.DOTALL,
)
PIXELS_TO_GRID = f"{GRID} · x / width and {GRID} · y / height (as `vltrain convert` does)"
_BOX_FIX = "write <box>(x1,y1),(x2,y2)</box>, whole numbers from 0 to 999"
_QUAD_FIX = "write <quad>(x1,y1),(x2,y2),(x3,y3),(x4,y4)</quad>, whole numbers from 0 to 999"
_COLOURS = ("#e6194b", "#0a7d32", "#1f55d6", "#b35c00", "#7d1fb0", "#00707a")
_WIDE = re.compile(r"[\u1100-\u11ff\u2e80-\u9fff\uac00-\ud7ff\uf900-\ufaff\uff00-\uffef]")
# File names (in part) of fonts that hold Chinese, Japanese and Korean characters.
_WIDE_FONTS = (
    "notosanscjk",
    "notosanssc",
    "sourcehansans",
    "wqy-",
    "droidsansfallback",
    "pingfang",
    "hiragino sans gb",
    "stheiti",
    "arial unicode",
    "msyh",
    "simhei",
    "simsun",
    "malgun",
    "msgothic",
)


@dataclass(frozen=True)
class Box:
    """A rectangle on the 1000 x 1000 grid and what it holds, if the text says so."""

    x1: int
    y1: int
    x2: int
    y2: int
    ref: str | None = None

    def in_pixels(self, width: int, height: int) -> tuple[float, float, float, float]:
        """Left, top, right and bottom on a picture of that size."""
        return (
            self.x1 * width / GRID,
            self.y1 * height / GRID,
            self.x2 * width / GRID,
            self.y2 * height / GRID,
        )


@dataclass(frozen=True)
class Quad:
    """Four corners on the 1000 x 1000 grid (leaning text, say) and what they hold."""

    corners: tuple[tuple[int, int], ...]  # (x, y), four of them, as the text has them
    ref: str | None = None

    def in_pixels(self, width: int, height: int) -> tuple[tuple[float, float], ...]:
        """The corners on a picture of that size."""
        return tuple((x * width / GRID, y * height / GRID) for x, y in self.corners)


Region = Box | Quad


@dataclass(frozen=True)
class PixelBox:
    """A rectangle in pixels of a picture, origin at the top left."""

    left: float
    top: float
    right: float
    bottom: float

    @classmethod
    def from_xywh(cls, x: float, y: float, width: float, height: float) -> "PixelBox":
        """From a corner and a size, as COCO has it."""
        return cls(x, y, x + width, y + height)

    @classmethod
    def from_shares(
        cls, corners: tuple[float, float, float, float], width: int, height: int
    ) -> "PixelBox":
        """From left, top, right and bottom as shares of the picture's sides, 0 to 1."""
        left, top, right, bottom = corners
        return cls(left * width, top * height, right * width, bottom * height)


def clip_to_picture(pixels: PixelBox, width: int, height: int) -> PixelBox | Fault:
    """The part of a rectangle that lies on a picture of that size, or why there is none."""
    if width <= 0 or height <= 0:
        message = f"the picture is {width} x {height} pixels"
        return Fault("zero_size_picture", message, "give the size of the picture in pixels")
    left, top, right, bottom = pixels.left, pixels.top, pixels.right, pixels.bottom
    shown = f"the box from ({left:g}, {top:g}) to ({right:g}, {bottom:g})"
    if not all(map(math.isfinite, (left, top, right, bottom))):
        return Fault("bad_number", f"{shown} is not of finite numbers", "mend or remove the box")
    if right <= left or bottom <= top:
        message = f"{shown} has no area"
        return Fault("empty_box", message, "write the top left corner first, or remove the box")
    if left >= width or top >= height or right <= 0 or bottom <= 0:
        message = f"{shown} lies outside the picture of {width} x {height} pixels"
        return Fault("box_outside_picture", message, "mend or remove the box")
    return PixelBox(max(0, left), max(0, top), min(width, right), min(height, bottom))


def grid_box(pixels: PixelBox, width: int, height: int, ref: str | None = None) -> Box:
    """A rectangle in pixels on the 1000 x 1000 grid.

    What leaves the picture is cut off. Each side goes to the nearest line of the grid, so that
    `Box.in_pixels` gives it back within half a cell (width / 2000, height / 2000). The picture's
    right and lower edge have no line of their own: what would be 1000 becomes 999, up to a whole
    cell inside. Sides of less than a cell may fall together; the box then has two equal numbers.

    Raises:
        VltrainError: a box without area or outside the picture, or a picture without a size.
    """
    clipped = clip_to_picture(pixels, width, height)
    if isinstance(clipped, Fault):
        raise error_of([clipped], "box" if ref is None else f"box of {ref!r}")

    def line(place: float, side: int) -> int:
        return min(GRID - 1, round(place * GRID / side))

    return Box(
        line(clipped.left, width),
        line(clipped.top, height),
        line(clipped.right, width),
        line(clipped.bottom, height),
        ref,
    )


def write_regions(regions: Iterable[Region]) -> str:
    """Boxes and quads as text that `parse_regions` reads back to the same.

    Those that follow each other with the same ref stand behind one `<ref>`; groups are parted
    by a comma, which keeps a box without a ref from falling to the ref before it.

    Raises:
        VltrainError: numbers that are no box or quad on the grid, a ref that is empty, begins or
            ends with a blank, or holds a tag.
    """
    groups = groupby(regions, key=lambda region: region.ref)
    return ", ".join(
        _ref_text(ref) + "".join(_region_text(region) for region in group) for ref, group in groups
    )


def ref_fault(ref: str) -> Fault | None:
    """Why a text cannot stand in `<ref>`; None where it can."""
    fix = "name what the box holds in plain words"
    tag = TAG.search(ref)
    if tag:
        return Fault("bad_ref", f"the ref {ref!r} holds {tag[0]}", fix)
    if not ref or ref != ref.strip():
        return Fault("bad_ref", f"the ref {ref!r} is empty or has blanks around it", fix)
    return None


def parse_boxes(text: str) -> tuple[list[Box], list[str]]:
    """The boxes of a text, and a reason for each that could not be read. Never raises.

    A `<ref>` belongs to all boxes that follow it without a word between.
    """
    regions, reasons = parse_regions(text)
    return [region for region in regions if isinstance(region, Box)], reasons


def parse_regions(text: str) -> tuple[list[Region], list[str]]:
    """The boxes and quads of a text, and a reason for each that could not be read. Never raises.

    A `<ref>` belongs to all of them that follow it without a word between.
    """
    regions, faults = read_regions(text)
    reasons = [fault.message for fault in faults if fault.grade != "warning"]
    unpaired = re.findall(r"</?(?:ref|box|quad)>", _MARKUP.sub("", text))
    return regions, reasons + [f"{tag} does not pair up" for tag in unpaired]


def read_regions(
    text: str, picture: tuple[int, int] | None = None
) -> tuple[list[Region], list[Fault]]:
    """The boxes and quads of a text in order, and what is wrong inside their tags.

    Args:
        text: of a turn.
        picture: width and height in pixels of the picture they lie on, if known: to tell where
            numbers beyond the grid are pixels.
    """
    regions: list[Region] = []
    faults: list[Fault] = []
    ref: str | None = None
    ref_end = -1
    for markup in _MARKUP.finditer(text):
        if markup["shape"] is None:
            ref, ref_end = markup["ref"].strip() or None, markup.end()
            continue
        if text[max(ref_end, 0) : markup.start()].strip():
            ref = None
        ref_end = markup.end()
        shape, inside = markup["shape"], markup["inside"]
        numbers = _numbers(shape, inside)
        found = list(_shape_faults(shape, inside, numbers, picture))
        faults += found
        if not found or all(fault.grade == "warning" for fault in found):
            regions.append(_region(numbers, ref))
    return regions, faults


def _region(numbers: Sequence[int], ref: str | None) -> Region:
    """What the four numbers of a box or the eight of a quad say."""
    if len(numbers) == 4:
        return Box(*numbers, ref=ref)
    return Quad(tuple(zip(numbers[::2], numbers[1::2], strict=True)), ref)


def _ref_text(ref: str | None) -> str:
    if ref is None:
        return ""
    fault = ref_fault(ref)
    if fault:
        raise error_of([fault], "ref")
    return f"<ref>{ref}</ref>"


def _region_text(region: Region) -> str:
    """One box or quad between its tags."""
    if isinstance(region, Box):
        shape, corners = "box", ((region.x1, region.y1), (region.x2, region.y2))
    else:
        shape, corners = "quad", region.corners
    inside = ",".join(f"({x},{y})" for x, y in corners)
    found = _shape_faults(shape, inside, _numbers(shape, inside))
    faults = [fault for fault in found if fault.grade != "warning"]
    if faults:
        raise error_of(faults, shape)
    return f"<{shape}>{inside}</{shape}>"


def draw_boxes(image: Image.Image, text: str) -> Image.Image:
    """A copy of the picture with the boxes and quads of a text drawn on it, under their refs."""
    drawn = image.convert("RGB")
    canvas = ImageDraw.Draw(drawn)
    line = max(2, round(min(drawn.size) / 200))
    regions, reasons = parse_regions(text)
    for reason in reasons:
        logger.warning("not drawn: %s", reason)
    for number, region in enumerate(regions):
        colour = _COLOURS[number % len(_COLOURS)]
        if isinstance(region, Box):
            left, top, right, bottom = region.in_pixels(*drawn.size)
            canvas.rectangle((left, top, right, bottom), outline=colour, width=line)
        else:
            corners = region.in_pixels(*drawn.size)
            canvas.polygon(corners, outline=colour, width=line)
            left, top = min(x for x, _ in corners), min(y for _, y in corners)
        if region.ref:
            _draw_label(canvas, region.ref, (left, top), colour, drawn.size)
    return drawn


def _numbers(name: str, inside: str) -> tuple[int, ...]:
    """The numbers of a `<box>` or `<quad>`; none where it is not written as one."""
    match = (_BOX if name == "box" else _QUAD).fullmatch(inside)
    return tuple(map(int, match.groups())) if match else ()


def _shape_faults(
    name: str, inside: str, numbers: Sequence[int], picture: tuple[int, int] | None = None
) -> Iterator[Fault]:
    """What is wrong with the inside of one `<box>` or `<quad>`, of which `numbers` were read."""
    written = f"<{name}>{inside if len(inside) <= 60 else inside[:57] + '…'}</{name}>"
    if not numbers:
        fix = _BOX_FIX if name == "box" else _QUAD_FIX
        yield Fault("malformed_box", f"{written} is not a {name}", fix)
    elif min(numbers) < 0 or max(numbers) > GRID:
        message = f"{written} leaves the range [0, {GRID})"
        if picture and _fits(numbers, picture):
            message += f"; it looks like pixels of the picture's {picture[0]} x {picture[1]}"
        yield Fault("box_out_of_range", message, f"write {PIXELS_TO_GRID}")
    else:
        if name == "box" and (numbers[2] < numbers[0] or numbers[3] < numbers[1]):
            message = f"{written} is inverted: its second corner is left of or above its first"
            yield Fault("inverted_box", message, "write the top left corner, then the bottom right")
        if max(numbers) == GRID:
            message = f"{written} ends at exactly {GRID}; the last place on the grid is 999"
            yield Fault("box_at_1000", message, "write 999", "warning")


def _fits(numbers: Sequence[int], picture: tuple[int, int]) -> bool:
    """Do x and y, by turns, lie on a picture of that size in pixels?"""
    inside = min(numbers) >= 0
    return inside and max(numbers[::2]) <= picture[0] and max(numbers[1::2]) <= picture[1]


def _draw_label(
    canvas: ImageDraw.ImageDraw,
    label: str,
    corner: tuple[float, float],
    colour: str,
    size: tuple[int, int],
) -> None:
    """White text on a filled strip, above the corner where there is room, else below it."""
    font = label_font(max(12, round(min(size) / 28)), wide=bool(_WIDE.search(label)))
    left, top, right, bottom = canvas.textbbox((0, 0), label, font=font)
    width, height = right - left + 4, bottom - top + 4
    x = max(0, min(corner[0], size[0] - width))
    y = corner[1] - height if corner[1] >= height else corner[1]
    canvas.rectangle((x, y, x + width, y + height), fill=colour)
    canvas.text((x + 2 - left, y + 2 - top), label, font=font, fill="white")


@lru_cache(maxsize=32)
def label_font(pixels: int, *, wide: bool) -> ImageFont.FreeTypeFont:
    """A font of that height; `wide` asks for one with Chinese, Japanese and Korean characters."""
    import matplotlib

    path = wide_font_file() if wide else None
    if wide and path is None:
        logger.warning("no font with CJK characters on this machine: such labels are unreadable")
    dejavu = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    return ImageFont.truetype(str(path or dejavu), pixels)


@lru_cache(maxsize=1)
def wide_font_file() -> Path | None:
    """A font file of this machine that holds CJK characters, None where there is none.

    One that is known to hold those of all three languages goes before what else is there.
    """
    from matplotlib.font_manager import findSystemFonts

    files = sorted(Path(file) for file in findSystemFonts())
    named = (file for part in _WIDE_FONTS for file in files if part in file.name.lower())
    holding = (file for character in "的の한" for file in files if _holds(file, character))
    return next(named, None) or next(holding, None)


def _holds(file: Path, character: str) -> bool:
    """Whether a font has a glyph for a character."""
    from matplotlib.ft2font import FT2Font

    try:
        return FT2Font(str(file)).get_char_index(ord(character)) != 0
    except (OSError, RuntimeError):
        return False  # no font, or of a kind that cannot be read
