"""The forms of ms-swift: `query`/`response`/`history`, and boxes in `objects`.

`objects` is `{"ref": ["the cat"], "bbox": [[x1, y1, x2, y2]], "bbox_type": …}`, or the older list
(also as a string of JSON) of `{"caption": …, "bbox": …, "bbox_type": …, "image": number}`. In the
text each `<ref-object>` stands for the next name and each `<bbox>` for the next box.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from vltrain.data.conversation import TextPart
from vltrain.data.faults import Fault
from vltrain.data.grounding import GRID
from vltrain.data.turn_lists import Draft, Piece, json_type, near_miss

ImageSize = Callable[[str], tuple[int, int] | Fault]
"""Where a picture is -> its width and height in pixels, or why they are not known."""

_OBJECT = re.compile(r"<ref-object>|<bbox>")
_GRIDS = {"norm1": 1, "norm_1": 1, "norm1000": GRID, "norm_1000": GRID}  # width of the whole
_PIXELS = ("real", None)  # in ms-swift, boxes that do not say are in pixels
_OBJECTS_FIX = 'write {"ref": ["…"], "bbox": [[x1, y1, x2, y2]], "bbox_type": "real"}'


@dataclass(frozen=True)
class _Box:
    """A box as `objects` has it; nothing of it is checked."""

    corners: Any  # [x1, y1, x2, y2]
    unit: Any  # "real": pixels; "norm1", "norm1000": shares of the picture
    picture: Any  # which of the record's pictures it lies on, from 0


def as_messages(record: dict[str, Any]) -> tuple[dict[str, Any], list[Fault]]:
    """`history`, `query` and `response` as a record with `messages`, all its other keys kept.

    The list is empty where one of them cannot be read.
    """
    said, faults = _said(record)
    turns = [
        {"role": "assistant" if number % 2 else "user", "content": text}
        for number, text in enumerate(said)
    ]
    return {**record, "messages": [] if faults else turns}, faults


def _said(record: dict[str, Any]) -> tuple[list[str], list[Fault]]:
    """What is said, by turns of user and assistant, and what is wrong with it."""
    history = record.get("history") or []
    if not isinstance(history, list):
        message = f"`history` is {json_type(history)}, not a list of pairs"
        return [], [Fault("bad_turn", message, 'write [["question", "answer"], …]')]
    said: list[str] = []
    faults: list[Fault] = []
    for number, pair in enumerate(history):
        if isinstance(pair, list) and [type(text) for text in pair] == [str, str]:
            said += pair
        else:
            message = f"entry {number} of `history` is not a question and its answer"
            faults.append(Fault("bad_turn", message, 'write ["question", "answer"]'))
    for key in ("query", "response"):
        if isinstance(record.get(key), str):
            said.append(record[key])
        else:
            what = f"is {json_type(record[key])}" if key in record else "is not there"
            message = f"`{key}` {what}{'' if key in record else near_miss(key, record)}"
            faults.append(Fault("bad_turn", message, f'write "{key}" as a string'))
    return said, faults


def with_objects(
    drafts: Sequence[Draft], objects: Any, sources: Sequence[str], image_size: ImageSize | None
) -> tuple[list[Draft], list[Fault]]:
    """Write the names and boxes of `objects` where the text has room for them.

    Args:
        drafts: the turns; `<ref-object>` becomes `<ref>name</ref>`, `<bbox>` `<box>…</box>` on
            the 1000 x 1000 grid.
        objects: what the record has under this key.
        sources: of the record's pictures, in order.
        image_size: measures pictures, for boxes in pixels; None: such boxes are refused.
    """
    read = _read_objects(objects)
    if isinstance(read, Fault):
        return list(drafts), [read]
    refs, boxes = read
    faults: list[Fault] = []
    written: list[str] = []
    for number, box in enumerate(boxes):
        text = _box_text(box, sources, image_size)
        if isinstance(text, Fault):
            message = f"box {number} of `objects` {text.message}"
            faults.append(replace(text, message=message))
        written.append("<bbox>" if isinstance(text, Fault) else text)
    texts = {"<ref-object>": iter([f"<ref>{ref}</ref>" for ref in refs]), "<bbox>": iter(written)}
    placed = [replace(d, pieces=tuple(_with_texts(d.pieces, texts))) for d in drafts]
    faults += _number_faults(drafts, {"<ref-object>": len(refs), "<bbox>": len(boxes)})
    return placed, faults


def _read_objects(objects: Any) -> tuple[list[str], list[_Box]] | Fault:
    """The names and the boxes of `objects`, or why they cannot be read."""
    if isinstance(objects, str):
        try:
            objects = json.loads(objects)
        except (ValueError, RecursionError):
            return Fault("bad_objects", "`objects` is a string that is not JSON", _OBJECTS_FIX)
    if isinstance(objects, list) and all(isinstance(entry, dict) for entry in objects):
        refs = [entry["caption"] for entry in objects if entry.get("caption") is not None]
        boxes = [
            _Box(entry["bbox"], entry.get("bbox_type"), entry.get("image", 0))
            for entry in objects
            if entry.get("bbox") is not None
        ]
    elif isinstance(objects, dict):
        refs, corners = objects.get("ref") or [], objects.get("bbox") or []
        if not isinstance(refs, list) or not isinstance(corners, list):
            return Fault("bad_objects", "`ref` or `bbox` of `objects` is no list", _OBJECTS_FIX)
        pictures = objects.get("image_id") or [0] * len(corners)
        if not isinstance(pictures, list) or len(pictures) != len(corners):
            message = "`image_id` of `objects` is not a list as long as `bbox`"
            return Fault("bad_objects", message, "name one picture for each box, from 0")
        unit = objects.get("bbox_type")
        boxes = [_Box(box, unit, place) for box, place in zip(corners, pictures, strict=True)]
    else:
        message = f"`objects` is {json_type(objects)}, not an object"
        return Fault("bad_objects", message, _OBJECTS_FIX)
    if not all(isinstance(ref, str) for ref in refs):
        return Fault("bad_objects", "a name in `objects` is not a string", _OBJECTS_FIX)
    return refs, boxes


def _box_text(box: _Box, sources: Sequence[str], image_size: ImageSize | None) -> str | Fault:
    """A box as the model reads it; a fault's message goes on behind the box's name."""
    numbers = box.corners
    if (
        not isinstance(numbers, list)
        or len(numbers) != 4
        or not all(type(number) in (int, float) and abs(number) < 1e9 for number in numbers)
    ):
        return Fault("malformed_box", "is not [x1, y1, x2, y2]", _OBJECTS_FIX)
    whole = _whole(box, sources, image_size)
    if isinstance(whole, Fault):
        return whole
    x1, y1, x2, y2 = (_on_grid(number, whole[axis % 2]) for axis, number in enumerate(numbers))
    return f"<box>({x1},{y1}),({x2},{y2})</box>"


def _whole(
    box: _Box, sources: Sequence[str], image_size: ImageSize | None
) -> tuple[int, int] | Fault:
    """Width and height of a box's picture, in the box's own unit."""
    if isinstance(box.unit, str) and box.unit in _GRIDS:
        return _GRIDS[box.unit], _GRIDS[box.unit]
    if box.unit not in _PIXELS:
        message = f"has the unit {box.unit!r}, which is not known"
        return Fault("bad_objects", message, "bbox_type is real (pixels), norm1 or norm1000")
    if type(box.picture) is not int or not 0 <= box.picture < len(sources):
        message = f"lies on picture {box.picture}, the record has {len(sources)}"
        return Fault("bad_objects", message, "count the record's pictures from 0")
    unknown = Fault(
        "pixel_box",
        f"is in pixels of {sources[box.picture]!r}, whose size is not known",
        "mend the picture's path, or write boxes as shares: bbox_type norm1 or norm1000",
    )
    size = unknown if image_size is None else image_size(sources[box.picture])
    return unknown if isinstance(size, Fault) or 0 in size else size


def _on_grid(number: float, whole: int) -> int:
    """A place on the grid: rounded, with the far edge on the grid's last line.

    What is counted on a grid of 1000 already stays as it is, edge and all.
    """
    if whole == GRID:
        return round(number)
    place = round(number * GRID / whole)
    return GRID - 1 if place == GRID else place


def _with_texts(pieces: Sequence[Piece], texts: dict[str, Iterator[str]]) -> Iterator[Piece]:
    """The pieces with their placeholders for objects written out, as long as there are any."""
    for piece in pieces:
        if isinstance(piece, TextPart):
            yield TextPart(_OBJECT.sub(lambda mark: next(texts[mark[0]], mark[0]), piece.text))
        else:
            yield piece


def _number_faults(drafts: Sequence[Draft], given: dict[str, int]) -> Iterator[Fault]:
    """Names or boxes that the text has too few or too many places for."""
    pieces = chain.from_iterable(draft.pieces for draft in drafts)
    text = "\0".join(piece.text for piece in pieces if isinstance(piece, TextPart))
    for mark, number in given.items():
        message = f"{text.count(mark)} {mark} in the turns, {number} in `objects`"
        if text.count(mark) > number:
            yield Fault("missing_objects", message, "add what is missing to `objects`")
        elif text.count(mark) < number:
            fix = f"write {mark} where each belongs"
            yield Fault("unplaced_objects", message + ": the others are not used", fix, "warning")
