"""Referring expressions (RefCOCO, RefCOCO+, RefCOCOg) as JSON -> one conversation for each.

Two forms are about. In the flat one every entry has its picture, its expression or expressions
and its box:

    {"image": "a.jpg", "expressions": ["the cat"], "bbox": [x, y, w, h], "width": …, "height": …}

In the other, `refs(unc).p` saved as JSON, an entry has `ann_id` and `sentences`, and the boxes are
in the `instances.json` beside it. The pickle itself is not read: opening one runs what is in it.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vltrain.data.coco import CocoFile
from vltrain.data.conversion import (
    BoxForm,
    Conversion,
    Pictures,
    check_template,
    is_source,
    numbers_of,
    picture_record,
    refuse_form,
    size_of,
)
from vltrain.data.grounding import PixelBox, ref_fault, write_regions
from vltrain.errors import VltrainError

EXPRESSION_QUESTION = "Where is {expression}?"
_PICTURE_KEYS = ("image", "file_name", "image_path", "img_path", "img_name")
_EXPRESSION_KEYS = ("expressions", "expression", "sentences", "sentence", "sents", "sent")
_SENTENCE_KEYS = ("sent", "raw", "sentence")  # of one of the `sentences`
_BOX_KEYS = ("bbox", "bboxes", "box", "boxes")
_FORM_FIX = (
    'write each entry as {"image": …, "expressions": […], "bbox": [x, y, width, height]}; '
    "--boxes names another form of boxes, --instances the file that holds them"
)


@dataclass(frozen=True)
class Referral:
    """Something on a picture and the expressions that mean it."""

    picture: str  # its file's name
    expressions: tuple[str, ...]
    boxes: tuple[PixelBox, ...]
    size: tuple[int, int]  # width, height in pixels
    number: int  # of the entry in the file's list, from 0

    @property
    def place(self) -> str:
        """What messages call it."""
        return f"entry {self.number}"


def convert_refcoco(
    entries: Sequence[Any],
    *,
    where: str,
    pictures: Pictures,
    boxes: BoxForm = "xywh",
    splits: Collection[str] = (),
    instances: CocoFile | None = None,
    question: str = EXPRESSION_QUESTION,
) -> Conversion:
    """One conversation for each expression: where it is, and its box or boxes.

    Args:
        entries: the file's list.
        where: what errors call the file.
        pictures: where they are; asked for a size only where the file gives none.
        boxes: the form that the file's boxes are written in.
        splits: the values of `split` to take; empty: the file may hold no more than one.
        instances: where entries without a box find one, by `ann_id`.
        question: `{expression}` in it becomes the expression.

    Raises:
        VltrainError: entries of another form (all such faults in one message), several splits
            and none chosen, or boxes that are written in another form than `boxes`.
    """
    check_template(question, "{expression}")
    conversion = Conversion()
    chosen = _chosen(entries, splits, where, conversion)
    reader = _Reader(pictures, instances, boxes)
    read = [reader.referral(number, entry) for number, entry in chosen]
    refuse_form(reader.faults, where, _FORM_FIX)
    if boxes != "normalised" and 0 < reader.largest <= 1:
        what = f"all boxes lie within 0 and 1, read as {boxes} in pixels"
        raise VltrainError.at(where, what=what, fix="pass --boxes normalised")
    for referral in filter(None, read):
        _convert_referral(referral, conversion, pictures, question)
    conversion.refuse_misread_boxes(where, f"say how the boxes are written: --boxes, now {boxes}")
    return conversion


def _convert_referral(
    referral: Referral, conversion: Conversion, pictures: Pictures, question: str
) -> None:
    """Add a record for each of a referral's expressions."""
    source = pictures.source(referral.picture)
    if not is_source(source):
        conversion.leave_out("pictures whose names a record cannot hold", referral.place)
        return
    placed = [conversion.place_box(box, referral.size, referral.place) for box in referral.boxes]
    whole = [box for box in placed if box is not None]
    if len(whole) < len(placed):  # part of what is meant would be a wrong answer
        lost = len(referral.expressions)
        conversion.leave_out("expressions without all their boxes", referral.place, lost)
        return
    for number, expression in enumerate(referral.expressions):
        if ref_fault(expression):
            conversion.leave_out("expressions that are empty or hold tags", referral.place)
            continue
        answer = write_regions(replace(box, ref=expression) for box in whole)
        exchange = (question.replace("{expression}", expression), answer)
        record = picture_record(f"{referral.number}-{number}", source, [exchange])
        conversion.add(record, referral.place)


def pixel_box(corners: Sequence[float], form: BoxForm, size: tuple[int, int]) -> PixelBox:
    """Four numbers of a form, in pixels of a picture of that width and height."""
    first, second, third, fourth = corners
    if form == "xywh":
        return PixelBox.from_xywh(first, second, third, fourth)
    if form == "xyxy":
        return PixelBox(first, second, third, fourth)
    return PixelBox.from_shares((first, second, third, fourth), *size)


class _Reader:
    """Takes entries apart and keeps the faults of their form."""

    def __init__(self, pictures: Pictures, instances: CocoFile | None, form: BoxForm) -> None:
        self.faults: list[str] = []
        self.largest = 0.0  # number of all the boxes that entries hold, without its sign
        self._pictures = pictures
        self._instances = instances
        self._form: BoxForm = form
        regions = instances.regions if instances else ()
        self._regions = {region.id: region for region in regions if region.id is not None}

    def referral(self, number: int, entry: Mapping[str, Any]) -> Referral | None:
        """What an entry says; None, and faults, where it is of another form."""
        expressions = _expressions(entry)
        if not expressions:
            return self._refuse(number, "has no expression: `expressions` or `sentences`")
        if _first(entry, _BOX_KEYS) is None and "ann_id" in entry and self._instances:
            return self._joined(number, entry["ann_id"], expressions, self._instances)
        corners = _corners(_first(entry, _BOX_KEYS))
        if not corners:
            return self._refuse(number, "has no box: `bbox` of four numbers, or a list of such")
        name = _first(entry, _PICTURE_KEYS)
        if not isinstance(name, str):
            return self._refuse(number, "has no picture: `image` or `file_name`")
        size = size_of(entry) or self._pictures.size(name)
        if size is None:
            return self._refuse(number, f"has no `width` and `height`, and no file is {name!r}")
        if isinstance(size, str):
            return self._refuse(number, f"is of no size: {size}")
        self.largest = max(self.largest, *(abs(place) for box in corners for place in box))
        boxes = tuple(pixel_box(box, self._form, size) for box in corners)
        return Referral(name, expressions, boxes, size, number)

    def _joined(
        self, number: int, identity: Any, expressions: tuple[str, ...], instances: CocoFile
    ) -> Referral | None:
        """An entry whose picture and box stand in the instances file, under its `ann_id`.

        The entry's own `file_name` is no file's: it ends in the annotation's number.
        """
        region = self._regions.get(identity) if isinstance(identity, int | str) else None
        if region is None:
            fault = f"has the `ann_id` {identity!r}, which is not in the instances file"
            return self._refuse(number, fault)
        picture = instances.pictures[region.picture]
        size = picture.size or self._pictures.size(picture.name)
        if size is None:
            fault = f"is on a picture without `width` and `height`, and no file is {picture.name!r}"
            return self._refuse(number, fault)
        return Referral(picture.name, expressions, (region.box,), size, number)

    def _refuse(self, number: int, fault: str) -> None:
        self.faults.append(f"entry {number} {fault}")


def _chosen(
    entries: Sequence[Any], splits: Collection[str], where: str, conversion: Conversion
) -> list[tuple[int, Mapping[str, Any]]]:
    """The entries of the wanted splits, each with its number."""
    strange = [
        f"entry {n} is not an object" for n, entry in enumerate(entries) if not _is_map(entry)
    ]
    refuse_form(strange, where, _FORM_FIX)
    counts = Counter(str(entry["split"]) for entry in entries if "split" in entry)
    held = ", ".join(f"{name} ({count})" for name, count in sorted(counts.items()))
    if not splits and len(counts) > 1:
        fix = "name those to learn from, as in --split train"
        raise VltrainError.at(where, what=f"holds several splits: {held}", fix=fix)
    absent = sorted(set(splits) - counts.keys())
    if absent:
        what = f"holds no split {', '.join(absent)}; it holds {held or 'none'}"
        raise VltrainError.at(where, what=what, fix="name a split that is there, or none")
    chosen = []
    for number, entry in enumerate(entries):
        if splits and str(entry.get("split")) not in splits:
            conversion.leave_out("entries of other splits", f"entry {number}")
        else:
            chosen.append((number, entry))
    return chosen


def _is_map(entry: Any) -> bool:
    return isinstance(entry, dict)


def _first(entry: Mapping[str, Any], keys: Sequence[str]) -> Any:
    """The value of the first of several keys that is there."""
    return next((entry[key] for key in keys if entry.get(key) is not None), None)


def _expressions(entry: Mapping[str, Any]) -> tuple[str, ...]:
    """What an entry calls its thing; empty where it says so in no known way."""
    listed = _first(entry, _EXPRESSION_KEYS)
    listed = listed if isinstance(listed, list) else [listed]
    texts = [_first(text, _SENTENCE_KEYS) if _is_map(text) else text for text in listed]
    if not all(isinstance(text, str) for text in texts):
        return ()
    return tuple(text.strip() for text in texts)


def _corners(value: Any) -> tuple[tuple[float, ...], ...]:
    """Four numbers for each box of an entry; empty where they are of another form."""
    one = numbers_of(value, 4)
    if one is not None:
        return (one,)
    boxes = [numbers_of(box, 4) for box in value] if isinstance(value, list) else []
    return tuple(box for box in boxes if box is not None) if None not in boxes else ()
