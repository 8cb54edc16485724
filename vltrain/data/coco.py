"""COCO's object annotations (`instances_*.json`) -> one conversation per picture.

The file is an object of three lists: `images` (`id`, `file_name`, `width`, `height`),
`categories` (`id`, `name`) and `annotations` (`image_id`, `category_id`, `bbox` as
[x, y, width, height] in pixels, `iscrowd`). https://cocodataset.org/#format-data
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from vltrain.data.conversion import (
    Conversion,
    Pictures,
    check_template,
    is_source,
    numbers_of,
    picture_record,
    refuse_form,
    size_of,
)
from vltrain.data.grounding import Box, PixelBox, ref_fault, write_regions
from vltrain.errors import VltrainError

CATEGORY_QUESTION = "Detect every {category}."
_FORM_FIX = (
    "give COCO's object annotations: an object with `images` (id, file_name, width, height), "
    "`categories` (id, name) and `annotations` (image_id, category_id, bbox)"
)

Id = int | str


@dataclass(frozen=True)
class CocoPicture:
    """A picture as an annotation file names it."""

    name: str  # its file's
    size: tuple[int, int] | None  # width, height in pixels; None: the file does not say
    place: str  # "images[3]"


@dataclass(frozen=True)
class CocoRegion:
    """One thing on a picture."""

    picture: Id
    category: Id
    box: PixelBox
    crowd: bool  # one box around many, without saying how many
    place: str  # "annotations[3]"
    id: Id | None = None


@dataclass(frozen=True)
class CocoFile:
    """What an annotation file holds, every id checked."""

    pictures: dict[Id, CocoPicture]
    categories: dict[Id, str]
    regions: tuple[CocoRegion, ...]


def convert_coco(
    value: Any, *, where: str, pictures: Pictures, question: str = CATEGORY_QUESTION
) -> Conversion:
    """One conversation for each picture: a question for each category that is on it.

    The answer names all boxes of the category, from top to bottom and from left to right, behind
    one `<ref>`. Crowds, boxes without area and boxes outside their picture are left out.

    Args:
        value: the file's JSON.
        where: what errors call the file.
        pictures: where they are; asked for a size only where the file gives none.
        question: `{category}` in it becomes the category's name.

    Raises:
        VltrainError: the file is not of COCO's form (all such faults in one message), or a
            picture's size is not known.
    """
    check_template(question, "{category}")
    coco = read_coco(value, where)
    regions: dict[Id, list[CocoRegion]] = defaultdict(list)
    for region in coco.regions:
        regions[region.picture].append(region)
    sizes = _sizes(coco, regions, where, pictures)
    conversion = Conversion()
    for identity, picture in coco.pictures.items():
        source = pictures.source(picture.name)
        boxes = _boxes_by_category(coco, regions[identity], sizes.get(identity), conversion)
        if not is_source(source):
            conversion.leave_out("pictures whose names a record cannot hold", picture.place)
        elif not boxes:
            conversion.leave_out("pictures without a box", picture.place)
        else:
            exchanges = [
                (question.replace("{category}", name), write_regions(found))
                for name, found in boxes
            ]
            conversion.add(picture_record(str(identity), source, exchanges), picture.place)
    conversion.refuse_misread_boxes(where, "COCO's bbox is [x, y, width, height] in pixels")
    return conversion


def read_coco(value: Any, where: str) -> CocoFile:
    """Take an annotation file apart.

    Raises:
        VltrainError: the file is not of COCO's form; all its faults are in the one message.
    """
    tables = ("images", "categories", "annotations")
    if not isinstance(value, dict):
        raise VltrainError.at(where, what="its JSON is no object of lists", fix=_FORM_FIX)
    lacking = [f"has no list `{name}`" for name in tables if not isinstance(value.get(name), list)]
    refuse_form(lacking, where, _FORM_FIX)
    faults: list[str] = []
    pictures = dict(_pictures(value["images"], faults))
    categories = dict(_categories(value["categories"], faults))
    regions = tuple(_regions(value["annotations"], pictures, categories, faults))
    refuse_form(faults, where, _FORM_FIX)
    return CocoFile(pictures, categories, regions)


def _pictures(entries: Sequence[Any], faults: list[str]) -> Iterator[tuple[Id, CocoPicture]]:
    seen: set[Id] = set()
    for place, entry in _objects("images", entries, faults):
        name, size = entry.get("file_name"), size_of(entry)
        if not _is_new_id(entry.get("id"), seen, place, faults):
            continue
        if not isinstance(name, str) or not name:
            faults.append(f"{place}: has no `file_name`")
        elif isinstance(size, str):
            faults.append(f"{place}: {size}")
        else:
            yield entry["id"], CocoPicture(name, size, place)


def _categories(entries: Sequence[Any], faults: list[str]) -> Iterator[tuple[Id, str]]:
    seen: set[Id] = set()
    names: set[str] = set()
    for place, entry in _objects("categories", entries, faults):
        if not _is_new_id(entry.get("id"), seen, place, faults):
            continue
        name = entry.get("name")
        if not isinstance(name, str):
            faults.append(f"{place}: has no `name`")
            continue
        name = name.strip()
        fault = ref_fault(name)
        if fault:
            faults.append(f"{place}: {fault.message}")
        elif name in names:  # one question with two answers
            faults.append(f"{place}: its name {name!r} is taken already")
        else:
            names.add(name)
            yield entry["id"], name


def _regions(
    entries: Sequence[Any],
    pictures: dict[Id, CocoPicture],
    categories: dict[Id, str],
    faults: list[str],
) -> Iterator[CocoRegion]:
    for place, entry in _objects("annotations", entries, faults):
        found = []
        for key, table, known in (
            ("image_id", "images", pictures),
            ("category_id", "categories", categories),
        ):
            if not _is_id(entry.get(key)):
                found.append(f"{place}: has no `{key}`")
            elif entry[key] not in known:
                found.append(f"{place}: `{key}` {entry[key]!r} is not in `{table}`")
        corners = numbers_of(entry.get("bbox"), 4)
        if corners is None:
            found.append(f"{place}: `bbox` is {entry.get('bbox')!r:.60}, not four numbers")
        if found or corners is None:
            faults += found
            continue
        yield CocoRegion(
            picture=entry["image_id"],
            category=entry["category_id"],
            box=PixelBox.from_xywh(*corners),
            crowd=bool(entry.get("iscrowd")),
            place=place,
            id=entry["id"] if _is_id(entry.get("id")) else None,
        )


def _sizes(
    coco: CocoFile, wanted: dict[Id, list[CocoRegion]], where: str, pictures: Pictures
) -> dict[Id, tuple[int, int]]:
    """Width and height in pixels of the pictures that have regions."""
    sizes: dict[Id, tuple[int, int]] = {}
    faults: list[str] = []
    for identity in wanted:
        picture = coco.pictures[identity]
        size = picture.size or pictures.size(picture.name)
        if size is None:
            faults.append(f"{picture.place}: no `width` and `height`, no file {picture.name!r}")
        else:
            sizes[identity] = size
    refuse_form(faults, where, "write `width` and `height`, or name the pictures' folder: --images")
    return sizes


def _boxes_by_category(
    coco: CocoFile,
    regions: Sequence[CocoRegion],
    size: tuple[int, int] | None,
    conversion: Conversion,
) -> list[tuple[str, list[Box]]]:
    """The categories of one picture in the file's order, each with its boxes in reading order."""
    boxes: dict[Id, list[Box]] = defaultdict(list)
    for region in regions if size else ():
        if region.crowd:
            conversion.leave_out("crowd regions", region.place)
            continue
        box = conversion.place_box(region.box, size, region.place, coco.categories[region.category])
        if box is not None:
            boxes[region.category].append(box)
    return [
        (name, sorted(boxes[category], key=lambda box: (box.y1, box.x1, box.y2, box.x2)))
        for category, name in coco.categories.items()
        if category in boxes
    ]


def _objects(
    table: str, entries: Sequence[Any], faults: list[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a list, each with its place."""
    for number, entry in enumerate(entries):
        place = f"{table}[{number}]"
        if isinstance(entry, dict):
            yield place, entry
        else:
            faults.append(f"{place}: is not an object")


def _is_new_id(value: Any, seen: set[Id], place: str, faults: list[str]) -> bool:
    """Is this an id that nothing had before? Says so where it is not."""
    if not _is_id(value):
        faults.append(f"{place}: has no `id`")
        return False
    if value in seen:
        faults.append(f"{place}: its id {value!r} is taken already")
        return False
    seen.add(value)
    return True


def _is_id(value: Any) -> bool:
    return isinstance(value, int | str) and not isinstance(value, bool)
