"""Boxes in text: `<ref>the cat</ref><box>(x1,y1),(x2,y2)</box>`, read, checked and drawn.

Coordinates are whole numbers on a grid of 1000 x 1000 laid over the picture, origin at the top
left: [0, 1000) in both directions, whatever the picture's size.
"""

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from vltrain.data.faults import Fault

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


def parse_boxes(text: str) -> tuple[list[Box], list[str]]:
    """The boxes of a text, and a reason for each that could not be read. Never raises.

    A `<ref>` belongs to all boxes that follow it without a word between.
    """
    boxes, faults = read_boxes(text)
    reasons = [fault.message for fault in faults if fault.grade != "warning"]
    unpaired = re.findall(r"</?(?:ref|box|quad)>", _MARKUP.sub("", text))
    return boxes, reasons + [f"{tag} does not pair up" for tag in unpaired]


def read_boxes(text: str) -> tuple[list[Box], list[Fault]]:
    """The boxes of a text in order, and what is wrong inside its `<box>` and `<quad>` pairs."""
    boxes: list[Box] = []
    faults: list[Fault] = []
    ref: str | None = None
    ref_end = -1
    for markup in _MARKUP.finditer(text):
        if markup["shape"] is None:
            ref, ref_end = markup["ref"].strip(), markup.end()
            continue
        if text[max(ref_end, 0) : markup.start()].strip():
            ref = None
        ref_end = markup.end()
        found = list(_shape_faults(markup["shape"], markup["inside"]))
        faults += found
        if markup["shape"] == "box" and all(fault.grade == "warning" for fault in found):
            boxes.append(Box(*_numbers(_BOX, markup["inside"]), ref=ref or None))
    return boxes, faults


def draw_boxes(image: Image.Image, text: str) -> Image.Image:
    """A copy of the picture with the boxes of a text drawn on it, each under its `<ref>`."""
    drawn = image.convert("RGB")
    canvas = ImageDraw.Draw(drawn)
    line = max(2, round(min(drawn.size) / 200))
    boxes, reasons = parse_boxes(text)
    for reason in reasons:
        logger.warning("not drawn: %s", reason)
    for number, box in enumerate(boxes):
        colour = _COLOURS[number % len(_COLOURS)]
        left, top, right, bottom = box.in_pixels(*drawn.size)
        canvas.rectangle((left, top, right, bottom), outline=colour, width=line)
        if box.ref:
            _draw_label(canvas, box.ref, (left, top), colour, drawn.size)
    return drawn


def _numbers(shape: re.Pattern[str], inside: str) -> tuple[int, ...]:
    """The numbers of a box or quad; none where it is not written as one."""
    match = shape.fullmatch(inside)
    return tuple(map(int, match.groups())) if match else ()


def _shape_faults(name: str, inside: str) -> Iterator[Fault]:
    """What is wrong with the inside of one `<box>` or `<quad>`."""
    shape, fix = (_BOX, _BOX_FIX) if name == "box" else (_QUAD, _QUAD_FIX)
    numbers = _numbers(shape, inside)
    written = f"<{name}>{inside if len(inside) <= 60 else inside[:57] + '…'}</{name}>"
    if not numbers:
        yield Fault("malformed_box", f"{written} is not a {name}", fix)
    elif min(numbers) < 0 or max(numbers) > GRID:
        message = f"{written} leaves the range [0, {GRID})"
        yield Fault("box_out_of_range", message, f"scale x by {GRID} / width, y by {GRID} / height")
    else:
        if name == "box" and (numbers[2] < numbers[0] or numbers[3] < numbers[1]):
            message = f"{written} is inverted: its second corner is left of or above its first"
            yield Fault("inverted_box", message, "write the top left corner, then the bottom right")
        if max(numbers) == GRID:
            message = f"{written} ends at exactly {GRID}; the last place on the grid is 999"
            yield Fault("box_at_1000", message, "write 999", "warning")


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
    """A font file of this machine that holds CJK characters, None where there is none."""
    from matplotlib.font_manager import findSystemFonts

    files = sorted(Path(file) for file in findSystemFonts())
    for wanted in _WIDE_FONTS:
        for file in files:
            if wanted in file.name.lower():
                return file
    return None
