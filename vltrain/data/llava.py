"""LLaVA's list (`<image>` in the text, `image` beside it) -> the Qwen-VL form.

{"id": "7", "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat?"},
 {"from": "gpt", "value": "A cat."}]}
"""

from collections.abc import Iterator, Sequence
from typing import Any

from vltrain.data.conversation import TextPart
from vltrain.data.conversion import (
    Conversion,
    Pictures,
    holds_picture_tag,
    is_source,
    picture_line,
)
from vltrain.data.formats import record_id
from vltrain.data.turn_lists import ROLES, Piece, Placeholder, placeholder_text


def convert_llava(entries: Sequence[Any], *, pictures: Pictures) -> Conversion:
    """Each entry with its pictures where its `<image>` placeholders stand.

    The k-th placeholder becomes `Picture k: <img>…</img>`, the text around it stays as it is.
    Entries without pictures are kept. Left out and counted: entries that are no conversation,
    that have another number of pictures than of placeholders, or whose text holds `<img>` tags.

    Args:
        entries: the file's list.
        pictures: where they are.
    """
    conversion = Conversion()
    for number, entry in enumerate(entries):
        place = f"entry {number}"
        converted = _converted(entry, str(number), pictures)
        if isinstance(converted, str):
            conversion.leave_out(converted, place)
        else:
            conversion.add(converted, place)
    return conversion


def _converted(entry: Any, name: str, pictures: Pictures) -> dict[str, Any] | str:
    """One record, or why there is none."""
    turns = entry.get("conversations") if isinstance(entry, dict) else None
    if not isinstance(turns, list) or not all(map(_is_turn, turns)):
        return "entries without `conversations` of `from` and `value`"
    if any(turn["from"] not in ROLES for turn in turns):
        return "entries with a role other than human, gpt, user, assistant, system"
    if "video" in entry:
        return "entries about a video"
    names = _picture_names(entry)
    if names is None:
        return "entries whose `image` is no file name"
    sources = [pictures.source(picture) for picture in names]
    if not all(map(is_source, sources)):
        return "entries with pictures whose names a record cannot hold"
    if any(holds_picture_tag(turn["value"]) for turn in turns):
        return "entries whose text holds <img> tags"
    texts = [placeholder_text(turn["value"], turn["from"])[0] for turn in turns]
    placeholders = sum(isinstance(piece, Placeholder) for pieces in texts for piece in pieces)
    if placeholders != len(sources):
        relation = "more" if placeholders > len(sources) else "fewer"
        return f"entries with {relation} <image> than pictures"
    lines = (picture_line(number, source) for number, source in enumerate(sources, start=1))
    said = ["".join(_written(piece, lines) for piece in pieces) for pieces in texts]
    return {
        "id": record_id(entry) or name,
        "conversations": [
            {"from": ROLES[turn["from"]], "value": value}
            for turn, value in zip(turns, said, strict=True)
        ],
    }


def _written(piece: Piece, lines: Iterator[str]) -> str:
    """A piece of a turn as text, a placeholder as the next of the pictures' lines."""
    return piece.text if isinstance(piece, TextPart) else next(lines)


def _picture_names(entry: dict[str, Any]) -> list[str] | None:
    """The file names of an entry's pictures; None where they are something else."""
    listed = entry.get("images", entry.get("image"))
    names = [] if listed is None else listed if isinstance(listed, list) else [listed]
    return names if all(isinstance(name, str) and name for name in names) else None


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, dict) and all(isinstance(turn.get(k), str) for k in ("from", "value"))
