"""Lists of turns, as most formats have them: `from`/`value` or `role`/`content`.

They are read in two steps. A list becomes drafts, turns in which a picture may still be a
placeholder; then the drafts are filled with the pictures that the record names beside the list.
"""

import difflib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from typing import Any

from vltrain.data.conversation import ImagePart, Part, Role, TextPart, Turn
from vltrain.data.faults import Fault
from vltrain.data.markup import joined

ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
IMAGE_PLACEHOLDER = "<image>"
UNKNOWN_TURN = ("bad_turn", "role")  # kinds of fault in whose place a turn is missing
PICTURE_COUNT = ("missing_pictures", "unplaced_pictures")  # kinds of fault about their number
_LISTS = {  # keys of a list of turns, and what a turn is like
    "conversations": '{"from": "user", "value": "…"}',
    "messages": '{"role": "user", "content": "…"}',
}
_PICTURE_KEYS = ("image", "image_url", "path", "url")
_PART_FIX = 'parts are {"type": "text", "text": "…"} and {"type": "image", "image": "path"}'


@dataclass(frozen=True)
class Placeholder:
    """Where the next of the pictures beside the list belongs."""


Piece = TextPart | ImagePart | Placeholder


@dataclass(frozen=True)
class Draft:
    """A turn whose pictures may still be placeholders."""

    role: Role
    pieces: tuple[Piece, ...]
    position: int  # in the record's list, from 0
    learn: bool = True


ReadText = Callable[[str, str], tuple[tuple[Piece, ...], list[Fault]]]
"""Text of a turn, and what faults call the turn -> its pieces and its faults."""


def list_key(record: dict[str, Any]) -> str | None:
    """Under which key the record has its list of turns, null if need be; None: under none."""
    present = [key for key in _LISTS if key in record]
    return next((key for key in present if record[key] is not None), next(iter(present), None))


def turn_list(record: Any) -> tuple[list[Any], list[Fault]]:
    """The list of turns, or the fault that stands in its place."""

    def fault(kind: str, message: str, fix: str) -> tuple[list[Any], list[Fault]]:
        return [], [Fault(kind, message, fix)]

    if isinstance(record, list):
        return fault(
            "not_an_object",
            "the record is a list, not an object",
            "one object per record; take the inner list apart",
        )
    if not isinstance(record, dict):
        return fault(
            "not_an_object",
            f"the record is {json_type(record)}, not an object",
            'write {"conversations": [{"from": "user", "value": "…"}, …]}',
        )
    key = list_key(record)
    if key is None:
        meant = next((name for name in _LISTS if near_miss(name, record)), "conversations")
        return fault(
            "no_conversations",
            f"the record has no `{meant}`" + near_miss(meant, record),
            f'put its turns under "{meant}"',
        )
    turns = record[key]
    if not isinstance(turns, list):
        return fault(
            "no_conversations",
            f"`{key}` is {json_type(turns)}, not a list",
            f"write a list of turns: [{_LISTS[key]}, …]",
        )
    if not turns:
        return fault(
            "empty_conversation",
            f"`{key}` is empty",
            "add a question and its answer, or remove the record",
        )
    return turns, []


def drafts_of(record: Any, read_text: ReadText) -> tuple[list[Draft], list[Fault]]:
    """The turns of a record's list that can be read, and all that is wrong with them.

    Args:
        record: what the JSON held.
        read_text: reads what is said, one string or each text in a list of parts.
    """
    entries, faults = turn_list(record)
    drafts: list[Draft] = []
    for position, entry in enumerate(entries):
        draft, found = _draft(entry, position, read_text)
        faults += found
        drafts += [] if draft is None else [draft]
    return drafts, faults


def literal_text(text: str, where: str) -> tuple[tuple[Piece, ...], list[Fault]]:
    """Text in which nothing stands for a picture."""
    return (TextPart(text),), []


def placeholder_text(text: str, where: str) -> tuple[tuple[Piece, ...], list[Fault]]:
    """Text in which every `<image>` stands for a picture."""
    first, *others = text.split(IMAGE_PLACEHOLDER)
    pieces: list[Piece] = [TextPart(first)]
    for other in others:
        pieces += [Placeholder(), TextPart(other)]
    return tuple(pieces), []


def has_pictures(record: dict[str, Any]) -> bool:
    """Does the record name pictures beside its turns, under `images` or `image`?"""
    return _pictures_beside(record) is not None


def picture_sources(record: dict[str, Any]) -> tuple[list[str], list[Fault]]:
    """Where the pictures beside the turns are, in order: strings, or objects with a path."""
    value = _pictures_beside(record)
    listed = value if isinstance(value, list) else [] if value is None else [value]
    sources: list[str] = []
    faults: list[Fault] = []
    for number, entry in enumerate(listed):
        source = _source_of(entry, ("path", "url", "image"))
        if source is None:
            message = f"picture {number} beside the turns is {json_type(entry)} without a path"
            faults.append(Fault("bad_pictures", message, 'write {"images": ["path", …]}'))
        elif not source.strip():
            faults.append(_empty_path(f"picture {number} beside the turns"))
        sources.append((source or "").strip())
    return sources, faults


def filled(drafts: Sequence[Draft], record: dict[str, Any]) -> tuple[list[Turn], list[Fault]]:
    """Turns with their pictures: those beside the list take the places of the placeholders.

    Where there are fewer placeholders than pictures, as many as are missing are taken to stand at
    the front of the first user turn, each on a line of its own, as LLaVA and ms-swift do. So the
    pictures keep their order in the text, whichever of them lacked a place. A placeholder without
    a picture stays text.

    Args:
        drafts: the turns.
        record: what names the pictures, under `images` or `image`.
    """
    sources, faults = picture_sources(record)
    wanted = sum([isinstance(piece, Placeholder) for draft in drafts for piece in draft.pieces])
    faults += _count_faults(wanted, len(sources), record)
    first_user = next((draft for draft in drafts if draft.role == "user"), None)
    pictures: Iterator[Part] = chain(map(ImagePart, sources), repeat(TextPart(IMAGE_PLACEHOLDER)))
    turns: list[Turn] = []
    for draft in drafts:
        pieces: Iterable[Piece] = draft.pieces
        if draft is first_user and len(sources) > wanted:
            front = [Placeholder(), TextPart("\n")] * (len(sources) - wanted)
            pieces = [*front, *draft.pieces]
        parts = joined(
            [next(pictures) if isinstance(piece, Placeholder) else piece for piece in pieces]
        )
        turns.append(Turn(draft.role, parts, draft.position, draft.learn))
    return turns, faults


def near_miss(key: str, found: dict[str, Any]) -> str:
    """Which key may have been meant, said in brackets; nothing where none is near."""
    near = difflib.get_close_matches(key, [str(other) for other in found], n=1)
    return f" (`{near[0]}` is near it)" if near else ""


def json_type(value: Any) -> str:
    """A JSON value's type in JSON's own words."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return "null" if value is None else names.get(type(value), "a number")


def _draft(entry: Any, position: int, read_text: ReadText) -> tuple[Draft | None, list[Fault]]:
    """One turn and its faults; no turn where its role or its text is not known."""
    if not isinstance(entry, dict):
        message = f"turn {position} is {json_type(entry)}, not an object"
        return None, [Fault("bad_turn", message, 'write {"from": "user", "value": "…"}')]
    speaker, said = _turn_keys(entry)
    if speaker not in entry and said not in entry:
        message = f"turn {position} has neither `{speaker}`{near_miss(speaker, entry)} nor `{said}`"
        return None, [Fault("bad_turn", message, f'write {{"{speaker}": "user", "{said}": "…"}}')]
    faults = [
        *_key_faults(entry, position, speaker, "who speaks", (str,)),
        *_key_faults(
            entry, position, said, "what is said", (str, list) if said == "content" else (str,)
        ),
    ]
    if faults:
        return None, faults
    role = ROLES.get(entry[speaker])
    if role is None:
        message = f"turn {position} is from {entry[speaker]!r}, which is no role"
        return None, [Fault("role", message, "roles are user, assistant and system (first only)")]
    where = f"turn {position} ({role})"
    pieces, faults = _said(entry[said], where, read_text)
    learn = True
    if role == "assistant":
        learn, found = _weight(entry, where)
        faults += found
    return Draft(role, pieces, position, learn), faults


def _turn_keys(entry: dict[str, Any]) -> tuple[str, str]:
    """Under which keys a turn says who speaks and what is said."""
    pairs = (("from", "value"), ("role", "content"))
    if entry.get("from") is not None and entry.get("value") is not None:
        return pairs[0]
    return max(pairs, key=lambda pair: sum(entry.get(key) is not None for key in pair))


def _key_faults(
    entry: dict[str, Any], position: int, key: str, meaning: str, types: tuple[type, ...]
) -> Iterator[Fault]:
    """What is wrong with a key that a turn must have."""
    if key not in entry:
        message = f"turn {position} has no `{key}`{near_miss(key, entry)}"
        yield Fault("bad_turn", message, f'add "{key}": {meaning}')
    elif not isinstance(entry[key], types):
        wanted = "a string or a list of parts" if list in types else "a string"
        message = f"`{key}` of turn {position} is {json_type(entry[key])}, not {wanted}"
        yield Fault("bad_turn", message, f'write "{key}" ({meaning}) as {wanted}')


def _weight(entry: dict[str, Any], where: str) -> tuple[bool, list[Fault]]:
    """Is an assistant's turn learned? `weight` 1 or none: yes, 0: no."""
    weight = entry.get("weight")
    if weight is None or weight in (0, 1):
        return weight != 0, []
    shown = weight if isinstance(weight, int | float) else json_type(weight)
    message = f"{where} has the weight {shown}, which is neither 0 nor 1"
    return True, [Fault("bad_weight", message, "write 1 to learn it, 0 to only show it", "strict")]


def _said(
    value: str | list[Any], where: str, read_text: ReadText
) -> tuple[tuple[Piece, ...], list[Fault]]:
    """What a turn says: a string, or parts in the forms of OpenAI and transformers."""
    if isinstance(value, str):
        return read_text(value, where)
    pieces: list[Piece] = []
    faults: list[Fault] = []
    for number, entry in enumerate(value):
        piece = _piece(entry)
        if piece is None:
            kind = entry.get("type") if isinstance(entry, dict) else None
            shown = f"of type {kind!r}" if isinstance(kind, str) else json_type(entry)
            message = f"part {number} of {where} is {shown} and neither text nor picture"
            faults.append(Fault("bad_part", message, _PART_FIX))
        elif isinstance(piece, TextPart):
            read, found = read_text(piece.text, where)
            pieces += read
            faults += found
        else:
            faults += [_empty_path(f"part {number} of {where}")] if piece == ImagePart("") else []
            pieces.append(piece)
    return tuple(pieces), faults


def _piece(entry: Any) -> Piece | None:
    """One part of a turn; None where it is neither text nor a picture.

    A picture without a source is a placeholder for the next of those beside the list.
    """
    if not isinstance(entry, dict):
        return None
    kind = entry.get("type")
    source = _source_of(entry, _PICTURE_KEYS)
    if kind in (None, "text") and isinstance(entry.get("text"), str):
        return TextPart(entry["text"])
    if kind in (None, "image", "image_url") and source is not None:
        return ImagePart(source.strip())
    names_none = all(entry.get(key) is None for key in _PICTURE_KEYS)
    return Placeholder() if kind == "image" and names_none else None


def _source_of(value: Any, keys: Sequence[str]) -> str | None:
    """The path in a string, or in an object under one of the keys (`{"url": …}` inside too)."""
    if isinstance(value, str) or not isinstance(value, dict):
        return value if isinstance(value, str) else None
    for key in keys:
        inner = value.get(key)
        if isinstance(inner, dict):
            inner = inner.get("url") or inner.get("path")
        if isinstance(inner, str):
            return inner
    return None


def _pictures_beside(record: dict[str, Any]) -> str | list[Any] | dict[str, Any] | None:
    """What the record has under `images` or `image` that can name pictures; None: nothing."""
    for key in ("images", "image"):
        value = record.get(key)
        if value and isinstance(value, str | list | dict):
            return value
    return None


def _count_faults(placeholders: int, pictures: int, record: dict[str, Any]) -> Iterator[Fault]:
    """Placeholders and pictures that do not match in number.

    A record under `conversations` that has no picture at all may mean the word `<image>`: the
    original took it as text.
    """
    message = f"the turns have {placeholders} {IMAGE_PLACEHOLDER}, the record {pictures} pictures"
    if placeholders > pictures:
        hint = "" if pictures else near_miss("images", record)
        fix = 'add the missing pictures to "images", or remove the placeholders'
        as_text = not pictures and list_key(record) == "conversations"
        yield Fault("missing_pictures", message + hint, fix, "strict" if as_text else "unreadable")
    elif placeholders < pictures:
        more = f": {pictures - placeholders} more are put before the first user turn"
        fix = f"write {IMAGE_PLACEHOLDER} where each picture belongs"
        yield Fault("unplaced_pictures", message + more, fix, "warning")


def _empty_path(where: str) -> Fault:
    return Fault("empty_path", f"{where} has no path", "write the picture's path")
