"""A message as a list of its elements, and as the text that Qwen-VL reads: the original's forms.

A list has `{"image": path}`, `{"text": …}`, and `{"ref": …, "box": [[x1, y1, x2, y2], …]}`, whose
`ref` may be left out.
"""

import re
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

from vltrain.errors import VltrainError

_TAG = re.compile(r"<(img|ref|box|quad)>")
_KEYS = {"img": "image", "ref": "ref", "box": "box", "quad": "quad"}
_FIX = 'write {"image": path}, {"text": …} or {"ref": …, "box": [[x1, y1, x2, y2], …]}'


def from_list_format(elements: Iterable[Mapping[str, Any]]) -> str:
    """The text of a list of elements.

    Pictures are numbered from 1 and have a line each, `Picture 1: <img>path</img>`, with the
    blank that the training data has. (The tokenizer that came with Qwen-VL-Chat-Int4 left it out.)

    Raises:
        VltrainError: an element is none of those, or a box is not four numbers.
    """
    text = ""
    pictures = 0
    for place, element in enumerate(elements):
        if "image" in element:
            pictures += 1
            text += f"Picture {pictures}: <img>{element['image']}</img>\n"
        elif "text" in element:
            text += element["text"]
        elif "box" in element:
            if "ref" in element:
                text += f"<ref>{element['ref']}</ref>"
            text += "".join(_box_text(box, place) for box in element["box"])
        else:
            raise VltrainError.at(
                f"element {place}", what=f"{dict(element)} is not supported", fix=_FIX
            )
    return text


def _box_text(box: Any, place: int) -> str:
    try:
        x1, y1, x2, y2 = map(int, box)
    except (TypeError, ValueError) as error:
        what = f"{box!r} is not a box of four numbers"
        raise VltrainError.at(f"element {place}", what=what, fix=_FIX) from error
    return f"<box>({x1},{y1}),({x2},{y2})</box>"


def to_list_format(text: str) -> list[dict[str, str]]:
    """The elements of a text: what stands between tags, under `image`, `ref`, `box` or `quad`,
    and the `text` around them, NFC-normalised.

    A tag that closes what nobody opened is text; tags inside others stay as they are.

    Raises:
        VltrainError: a tag is not closed.
    """
    text = unicodedata.normalize("NFC", text)
    elements = []
    place = 0
    while opened := _TAG.search(text, place):
        end_tag = f"</{opened[1]}>"
        end = text.find(end_tag, opened.end())
        if end < 0:
            raise VltrainError.at(
                f"character {opened.start()}",
                what=f"{opened[0]} is not closed",
                fix=f"write {end_tag} behind what it holds",
            )
        elements += [{"text": text[place : opened.start()]}] if opened.start() > place else []
        elements.append({_KEYS[opened[1]]: text[opened.end() : end]})
        place = end + len(end_tag)
    return [*elements, {"text": text[place:]}] if place < len(text) else elements
