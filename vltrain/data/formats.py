"""JSON record -> Conversation, one function per format.

| format | turns | pictures |
| --- | --- | --- |
| `qwen_vl` | `conversations`: `from`/`value` | `<img>path</img>` in the text |
| `messages` | `messages`: `role`/`content`, text or parts | parts of type image or image_url |
| `llava`, `sharegpt` | either list, either keys | `<image>`, and `image` or `images` beside |
| `swift` | `query`/`response`/`history`, or a list | as `llava`; boxes in `objects` |

Any of them may have a first system turn or `system` beside the turns, and `weight` 0 or 1 on an
assistant's turn. Keys that no format knows are passed over. Lenient reading takes all that the
original training code took (roles in any order, tags of text left open); strict reading refuses
what teaches a model something that nobody meant.
"""

from collections.abc import Callable, Iterator
from typing import Any, Literal

from vltrain.data.conversation import Conversation, Role, TextPart, Turn
from vltrain.data.faults import Fault, error_of
from vltrain.data.markup import parts_of, prose_faults
from vltrain.data.swift import ImageSize, as_messages, with_objects
from vltrain.data.turn_lists import (
    IMAGE_PLACEHOLDER,
    PICTURE_COUNT,
    UNKNOWN_TURN,
    Draft,
    drafts_of,
    filled,
    has_pictures,
    json_type,
    list_key,
    literal_text,
    picture_sources,
    placeholder_text,
)
from vltrain.errors import VltrainError

Format = Literal["auto", "qwen_vl", "messages", "llava", "sharegpt", "swift"]
Reading = tuple[list[Turn], list[Fault]]


def conversation_from_record(
    record: Any,
    *,
    lenient: bool = False,
    where: str | None = None,
    format: Format = "auto",
    image_size: ImageSize | None = None,
) -> Conversation:
    """Read one element of a training file.

    Args:
        record: what the JSON held there.
        lenient: take what the original code took (for `labels="reference"`).
        where: what the error calls the record; without it, its id.
        format: how to read it; "auto" tells by its content.
        image_size: measures pictures, which boxes in pixels need; None: those are refused.

    Raises:
        VltrainError: the record cannot be read; all its faults are in the one message.
    """
    conversation, faults = read_conversation(record, format=format, image_size=image_size)
    refused = [fault for fault in faults if fault.refused(lenient=lenient)]
    if refused:
        raise error_of(refused, where or record_name(record))
    return conversation


def read_conversation(
    record: Any, *, format: Format = "auto", image_size: ImageSize | None = None
) -> tuple[Conversation, list[Fault]]:
    """The turns of a record that can be read, and all that is wrong with the record."""
    turns, faults = read_turns(record, format=format, image_size=image_size)
    if turns and not any(fault.kind in UNKNOWN_TURN for fault in faults):
        turns, leading = _without_leading_assistant(turns)
        faults += [*(leading if turns else ()), *_order_faults(turns)]
    return Conversation(tuple(turns), record_id(record)), faults


def read_turns(
    record: Any, *, format: Format = "auto", image_size: ImageSize | None = None
) -> Reading:
    """The turns of a record as they stand, a leading assistant turn too, whatever their order."""
    if format != "auto" and format not in READERS:
        fix = f"write auto, {', '.join(READERS)}"
        raise VltrainError.at("data.format", what=f"{format!r} is unknown", fix=fix)
    read = READERS[format_of(record) if format == "auto" else format]
    turns, faults = read(record, image_size)
    system = record.get("system") if isinstance(record, dict) else None
    if system is None or system == "":
        return turns, faults
    if not isinstance(system, str):
        message = f"`system` is {json_type(system)}, not a string"
        return turns, [*faults, Fault("bad_turn", message, 'write "system" as a string')]
    if turns and turns[0].role == "system":
        message = "the record has `system` beside its turns and a system turn among them"
        return turns, [*faults, Fault("order", message, "keep one of them", "strict")]
    return [Turn("system", (TextPart(system),)), *turns], faults


def format_of(record: Any) -> Format:
    """The format of a record, told by its keys and by how its text names pictures.

    `<img>` under `conversations` is Qwen-VL's own, whatever the turns' keys. `<image>`, or
    pictures beside turns of plain text, is LLaVA's. A record of no known form counts as
    `qwen_vl`, whose reader says what is missing.
    """
    key = list_key(record) if isinstance(record, dict) else None
    if key is None:
        asked = isinstance(record, dict) and ("query" in record or "response" in record)
        return "swift" if asked else "qwen_vl"
    text = _text_of(record[key])
    has_placeholders = IMAGE_PLACEHOLDER in text
    if key == "conversations" and "<img>" in text:
        return "llava" if has_placeholders and has_pictures(record) else "qwen_vl"
    if record.get("objects") is not None and ("<bbox>" in text or "<ref-object>" in text):
        return "swift"
    in_parts = any(isinstance(value, list) for value in _said(record[key]))
    if has_placeholders or (has_pictures(record) and not in_parts):
        return "llava"
    return "messages" if key == "messages" or in_parts else "qwen_vl"


def qwen_vl_turns(record: Any, image_size: ImageSize | None = None) -> Reading:
    """Turns whose text names pictures as `<img>path</img>`."""
    drafts, faults = drafts_of(record, parts_of)
    # No picture beside the list is meant: "image" may be a key of another tool.
    turns, found = filled(drafts, {})
    return turns, [*faults, *found]


def messages_turns(record: Any, image_size: ImageSize | None = None) -> Reading:
    """Turns whose pictures are parts of their own; text names none.

    `<img>` in the text is refused: see `markup.prose_faults`. A picture part without a source,
    as `transformers` has it, stands for the next of the pictures beside the turns.
    """
    return _filled(record, *drafts_of(record, literal_text))


def placeholder_turns(record: Any, image_size: ImageSize | None = None) -> Reading:
    """Turns in whose text every `<image>` stands for the next of the pictures beside them."""
    return _filled(record, *drafts_of(record, placeholder_text))


def swift_turns(record: Any, image_size: ImageSize | None = None) -> Reading:
    """`query`, `response` and `history`, or a list of turns, with the boxes of `objects`.

    With nothing beside it, a question may name its pictures as `<img>path</img>`, as the tool's
    first versions did for Qwen-VL.
    """
    if isinstance(record, dict) and not list_key(record):
        record, unread = as_messages(record)
        if unread:
            return [], unread
        alone = not has_pictures(record) and not record.get("objects")
        if alone and "<img>" in _text_of(record["messages"]):
            return qwen_vl_turns(record)
    drafts, faults = drafts_of(record, placeholder_text)
    if drafts and record.get("objects") is not None:
        sources, _ = picture_sources(record)
        drafts, found = with_objects(drafts, record["objects"], sources, image_size)
        faults += found
    return _filled(record, drafts, faults)


READERS: dict[Format, Callable[[Any, ImageSize | None], Reading]] = {
    "qwen_vl": qwen_vl_turns,
    "messages": messages_turns,
    "llava": placeholder_turns,
    "sharegpt": placeholder_turns,
    "swift": swift_turns,
}


def _said(entries: Any) -> list[Any]:
    """What the turns of a list say, as far as it is one; of any type."""
    listed = entries if isinstance(entries, list) else []
    turns = [entry for entry in listed if isinstance(entry, dict)]
    return [entry.get(key) for entry in turns for key in ("value", "content")]


def _text_of(entries: Any) -> str:
    """All that the turns of a list say in plain strings."""
    return "\0".join(text for text in _said(entries) if isinstance(text, str))


def _filled(record: Any, drafts: list[Draft], faults: list[Fault]) -> Reading:
    """The turns of drafts with the pictures beside them, and what is wrong with their text."""
    if not drafts:
        return [], faults
    turns, found = filled(drafts, record)
    if any(fault.kind in UNKNOWN_TURN for fault in faults):
        # A turn that is not known may have had places for pictures.
        found = [fault for fault in found if fault.kind not in PICTURE_COUNT]
    prose = [
        fault
        for turn in turns
        for part in turn.parts
        if isinstance(part, TextPart)
        for fault in prose_faults(part.text, turn.name)
    ]
    return turns, [*faults, *found, *prose]


def record_id(record: Any) -> str | None:
    """The record's own id, as text; None where it has none."""
    found = record.get("id") if isinstance(record, dict) else None
    return str(found) if isinstance(found, str | int) else None


def record_name(record: Any) -> str:
    """What an error calls a record of which only the value is known."""
    found = record_id(record)
    return "record" if found is None else f"record {found!r}"


def _without_leading_assistant(turns: list[Turn]) -> tuple[list[Turn], list[Fault]]:
    """Drop an assistant turn that nobody asked for: exactly one, as the original does."""
    first = 1 if turns[0].role == "system" else 0
    if turns[first:] and turns[first].role == "assistant":
        message = f"turn {turns[first].position} (assistant) answers nothing and is not learned"
        fix = "begin with a user turn"
        leading = Fault("leading_assistant", message, fix, "warning")
        return turns[:first] + turns[first + 1 :], [leading]
    return turns, []


def _order_faults(turns: list[Turn]) -> Iterator[Fault]:
    """Turns that do not go: system or none, then user and assistant by turns."""
    spoken = turns[1:] if turns and turns[0].role == "system" else turns
    if not spoken:
        message = "no user turn is left to begin with"
        yield Fault("empty_conversation", message, "add a question and its answer")
        return
    expected: Role = "user"
    for turn in spoken:
        if turn.role == "system":
            message = f"turn {turn.position} is from system, which may only come first"
            yield Fault("order", message, "move it to the front, or make it a user turn")
            continue
        if turn.role != expected:
            message = f"turn {turn.position} is from {turn.role}, {expected} is next"
            fix = "let user and assistant take turns; join two turns of one side"
            yield Fault("order", message, fix, "strict")
        expected = "assistant" if turn.role == "user" else "user"
    if not any(turn.role == "assistant" and turn.parts and turn.learn for turn in spoken):
        silent = not any(turn.role == "assistant" and turn.parts for turn in spoken)
        why = "says anything" if silent else "that says anything has a weight above 0"
        message = f"no assistant turn {why}: there is nothing to learn"
        yield Fault("nothing_to_learn", message, "add an answer, or remove the record", "strict")
    elif spoken[-1].role == "user":
        message = f"turn {spoken[-1].position}, the last, is from user: no answer follows"
        yield Fault("order", message, "add the assistant's answer, or remove the turn", "strict")
