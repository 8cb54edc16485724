"""What all conversions share: records on their way out, and an account of what was left behind.

A fault of an annotation file's form (a missing key, an id that nothing has) stops its
conversion, all such faults in one message. What an annotation is (a crowd, a box without area)
may keep it from becoming training data: it is left out and counted.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from vltrain.data.faults import Fault
from vltrain.data.grounding import GRID, Box, PixelBox, clip_to_picture, grid_box
from vltrain.data.markup import PICTURE_TAG
from vltrain.errors import VltrainError

BoxForm = Literal["xywh", "xyxy", "normalised"]
"""Corner and size in pixels, two corners in pixels, or two corners as shares of the sides."""

BOX_CUT = "boxes cut off at the edge of their picture"
_BOX_REASONS = {
    "empty_box": "boxes without area",
    "box_outside_picture": "boxes outside their picture",
}
_SHOWN_FAULTS = 20
_LARGEST = 1e9  # no picture has more pixels on a side, no box lies further off
_NOTABLE_EXCESS = 0.5 / GRID  # of the picture's side; less is lost in rounding
_MISFIT_EXCESS = 0.02  # of the picture's side; annotators' hands do not slip so far
_MISREAD_BOXES = 8  # fewer prove nothing about the form they are written in


class Pictures(Protocol):
    """Where the pictures of an annotation file are; a workflow knows."""

    def source(self, name: str) -> str:
        """What a training record calls the picture of that file name."""
        ...

    def size(self, name: str) -> tuple[int, int] | None:
        """Its width and height in pixels, None where the file cannot be read."""
        ...


@dataclass
class Tally:
    """How often something was met, and where first."""

    count: int
    first: str


@dataclass
class Conversion:
    """Training records made of annotations, and what did not become one."""

    records: list[dict[str, Any]] = field(default_factory=list)
    places: list[str] = field(default_factory=list)  # of each record, in the annotation file
    left_out: dict[str, Tally] = field(default_factory=dict)  # by reason
    changed: dict[str, Tally] = field(default_factory=dict)  # by what was done
    boxes: int = 0  # that were met
    misfits: int = 0  # boxes without area, outside their picture, or far over its edge

    def add(self, record: dict[str, Any], place: str) -> None:
        """Take a record that was made of what stands at a place."""
        self.records.append(record)
        self.places.append(place)

    def leave_out(self, reason: str, place: str, count: int = 1) -> None:
        """Count what becomes no training data."""
        self.left_out.setdefault(reason, Tally(0, place)).count += count

    def place_box(
        self, pixels: PixelBox, size: tuple[int, int], place: str, ref: str | None = None
    ) -> Box | None:
        """The box on the grid, or None and one more that is left out."""
        self.boxes += 1
        clipped = clip_to_picture(pixels, *size)
        if isinstance(clipped, Fault):
            self.misfits += 1
            self.leave_out(_BOX_REASONS.get(clipped.kind, clipped.message), place)
            return None
        excess = _excess(pixels, size)
        self.misfits += excess > _MISFIT_EXCESS
        if excess > _NOTABLE_EXCESS:
            self.changed.setdefault(BOX_CUT, Tally(0, place)).count += 1
        return grid_box(clipped, *size, ref)

    def refuse_misread_boxes(self, where: str, fix: str) -> None:
        """Raise VltrainError where most boxes do not fit their pictures as they were read."""
        if self.boxes >= _MISREAD_BOXES and self.misfits * 2 > self.boxes:
            what = f"{self.misfits} of {self.boxes} boxes are empty or leave their picture"
            raise VltrainError.at(where, what=what, fix=fix)


def picture_record(name: str, source: str, exchanges: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """A conversation about one picture in the Qwen-VL form.

    Args:
        name: the record's id.
        source: the picture's path, as the record is to have it.
        exchanges: questions with their answers; the picture goes before the first.
    """
    turns: list[dict[str, str]] = []
    for question, answer in exchanges:
        shown = question if turns else f"{picture_line(1, source)}\n{question}"
        turns.append({"from": "user", "value": shown})
        turns.append({"from": "assistant", "value": answer})
    return {"id": name, "conversations": turns}


def picture_line(number: int, source: str) -> str:
    """How a record brings its picture of that number, counted from 1."""
    return f"Picture {number}: <img>{source}</img>"


def is_source(source: str) -> bool:
    """Can this stand between `<img>` and `</img>`, and be read back as it is?"""
    return bool(source) and source == source.strip() and not holds_picture_tag(source)


def holds_picture_tag(text: str) -> bool:
    """Does a text hold `<img>` or `</img>`, which would bring a picture of its own?"""
    return bool(PICTURE_TAG.search(text))


def numbers_of(value: Any, count: int) -> tuple[float, ...] | None:
    """A JSON list of so many finite numbers; None for anything else."""
    if not isinstance(value, list) or len(value) != count or not all(map(_is_number, value)):
        return None
    return tuple(map(float, value))


def size_of(entry: dict[str, Any]) -> tuple[int, int] | str | None:
    """Width and height of a picture as an annotation gives them, in pixels.

    Returns:
        None where it gives neither; where they are no size, what is wrong with them.
    """
    width, height = entry.get("width"), entry.get("height")
    if width is None and height is None:
        return None
    if not (_is_number(width) and _is_number(height) and width >= 1 and height >= 1):
        return f"`width` and `height` are {width!r} and {height!r}, not a size in pixels"
    return int(width), int(height)


def check_template(question: str, placeholder: str) -> None:
    """Raise VltrainError where a question does not say what it asks for."""
    if placeholder not in question:
        what = f"{question!r} does not hold {placeholder}"
        raise VltrainError.at("--question", what=what, fix=f'write it as in "Find {placeholder}."')


def refuse_form(faults: Sequence[str], where: str, fix: str) -> None:
    """Raise VltrainError with the faults of a file's form, if there are any.

    Args:
        faults: each with its place: "annotations[3]: has no `bbox`".
        where: the file.
        fix: what the file should have been.
    """
    if not faults:
        return
    shown = "".join(f"\n  {fault}" for fault in faults[:_SHOWN_FAULTS])
    more = f"\n  and {len(faults) - _SHOWN_FAULTS} more" if len(faults) > _SHOWN_FAULTS else ""
    count = f"{len(faults)} fault{'' if len(faults) == 1 else 's'}"
    raise VltrainError.at(where, what=f"{count}{shown}{more}", fix=fix)


def _excess(pixels: PixelBox, size: tuple[int, int]) -> float:
    """How far a box reaches over the edge of its picture, as a share of the side."""
    width, height = size
    return max(
        -pixels.left / width,
        -pixels.top / height,
        pixels.right / width - 1,
        pixels.bottom / height - 1,
    )


def _is_number(value: Any) -> bool:
    """A JSON number of this world: not NaN, not infinite, not of four hundred digits."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return not (isinstance(value, float) and math.isnan(value)) and abs(value) <= _LARGEST
