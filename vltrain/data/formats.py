"""JSON record -> Conversation.

The Qwen-VL list: `{"id": …, "conversations": [{"from": "user", "value": "…"}, …]}`, pictures
as `<img>path</img>` inside the text. Lenient reading takes all that the original training code
took (roles in any order, tags of text left open); strict reading refuses what teaches a model
something that nobody meant.
"""

import difflib
import re
from collections.abc import Iterator
from typing import Any

from vltrain.data.conversation import Conversation, ImagePart, Part, Role, TextPart, Turn
from vltrain.data.faults import Fault, Grade, error_of

ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
TAG = re.compile(r"<(/?)(img|ref|box|quad)>")


def conversation_from_record(
    record: Any, *, lenient: bool = False, where: str | None = None
) -> Conversation:
    """Read one element of a training file.

    Args:
        record: what the JSON held there.
        lenient: take what the original code took (for `labels="reference"`).
        where: what the error calls the record; without it, its id.

    Raises:
        VltrainError: the record cannot be read; all its faults are in the one message.
    """
    conversation, faults = read_conversation(record)
    refused = [fault for fault in faults if fault.refused(lenient=lenient)]
    if refused:
        raise error_of(refused, where or record_name(record))
    return conversation


def read_conversation(record: Any) -> tuple[Conversation, list[Fault]]:
    """The turns of a record that can be read, and all that is wrong with the record."""
    listed, faults = _turn_list(record)
    turns: list[Turn] = []
    for position, entry in enumerate(listed):
        turn, found = _turn(entry, position)
        faults += found
        if turn is not None:
            turns.append(turn)
    if turns and len(turns) == len(listed):  # order means nothing while a turn is unknown
        turns, found = _without_leading_assistant(turns)
        faults += [*found, *_order_faults(turns)]
    return Conversation(tuple(turns), record_id(record)), faults


def record_id(record: Any) -> str | None:
    """The record's own id, as text; None where it has none."""
    found = record.get("id") if isinstance(record, dict) else None
    return str(found) if isinstance(found, str | int) else None


def record_name(record: Any) -> str:
    """What an error calls a record of which only the value is known."""
    found = record_id(record)
    return "record" if found is None else f"record {found!r}"


def _turn_list(record: Any) -> tuple[list[Any], list[Fault]]:
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
            f"the record is {_json_type(record)}, not an object",
            'write {"conversations": [{"from": "user", "value": "…"}, …]}',
        )
    if "conversations" not in record:
        return fault(
            "no_conversations",
            "the record has no `conversations`" + _near_miss("conversations", record),
            'put its turns under "conversations"',
        )
    turns = record["conversations"]
    if not isinstance(turns, list):
        return fault(
            "no_conversations",
            f"`conversations` is {_json_type(turns)}, not a list",
            'write a list of turns: [{"from": "user", "value": "…"}, …]',
        )
    if not turns:
        return fault(
            "empty_conversation",
            "`conversations` is empty",
            "add a question and its answer, or remove the record",
        )
    return turns, []


def _turn(entry: Any, position: int) -> tuple[Turn | None, list[Fault]]:
    """One turn and its faults; no turn where its role or its text is not known."""
    if not isinstance(entry, dict):
        message = f"turn {position} is {_json_type(entry)}, not an object"
        return None, [Fault("bad_turn", message, 'write {"from": "user", "value": "…"}')]
    faults = []
    for key, meaning in (("from", "who speaks"), ("value", "what is said")):
        if key not in entry:
            message = f"turn {position} has no `{key}`{_near_miss(key, entry)}"
            faults.append(Fault("bad_turn", message, f'add "{key}": {meaning}'))
        elif not isinstance(entry[key], str):
            message = f"`{key}` of turn {position} is {_json_type(entry[key])}, not a string"
            faults.append(Fault("bad_turn", message, f'write "{key}" ({meaning}) as a string'))
    if faults:
        return None, faults
    role = ROLES.get(entry["from"])
    if role is None:
        message = f"turn {position} is from {entry['from']!r}, which is no role"
        return None, [Fault("role", message, "roles are user, assistant and system (first only)")]
    parts, faults = parts_of(entry["value"], f"turn {position} ({role})")
    return Turn(role, parts, position), faults


def parts_of(text: str, where: str) -> tuple[tuple[Part, ...], list[Fault]]:
    """Take text apart at its pictures; find the tags that do not pair up.

    `<ref>`, `<box>` and `<quad>` stay in the text, which keeps every byte. `<|…|>` and
    `<imgpad>` mean nothing here: they are what somebody wrote.
    """
    parts: list[Part] = []
    faults: list[Fault] = []
    opened: re.Match[str] | None = None  # the tag that waits for its end; no two nest
    text_start = 0
    for tag in TAG.finditer(text):
        closes, name = bool(tag[1]), tag[2]
        if opened and closes and opened[2] == name:
            if name == "img":
                source = text[opened.end() : tag.start()].strip()
                parts += [TextPart(text[text_start : opened.start()]), ImagePart(source)]
                text_start = tag.end()
                faults += [] if source else [_empty_path(where)]
            opened = None
        elif opened and opened[2] == "img":
            faults.append(_misplaced("nested_tag", where, tag, "inside <img>", "unreadable"))
        elif closes:
            faults.append(_misplaced("stray_tag", where, tag, "without its beginning"))
        else:
            if opened:
                faults.append(_misplaced("nested_tag", where, tag, f"inside {opened[0]}"))
            opened = tag
    if opened:
        grade: Grade = "unreadable" if opened[2] == "img" else "strict"
        faults.append(_misplaced("unclosed_tag", where, opened, "without its end", grade))
    parts.append(TextPart(text[text_start:]))
    return tuple(part for part in parts if part != TextPart("")), faults


def _empty_path(where: str) -> Fault:
    message = f"{where} has an <img></img> without a path"
    return Fault("empty_path", message, "write the picture's path, or remove the tags", "strict")


def _misplaced(
    kind: str, where: str, tag: re.Match[str], how: str, grade: Grade = "strict"
) -> Fault:
    """A tag that does not pair up, with the text around it."""
    around = tag.string[max(0, tag.start() - 12) : tag.end() + 12]
    message = f"{where} has {tag[0]} {how}, at character {tag.start()}: {around!r}"
    return Fault(kind, message, f"write <{tag[2]}>…</{tag[2]}>, one after the other", grade)


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
    if not any(turn.role == "assistant" and turn.parts for turn in spoken):
        message = "no assistant turn says anything: there is nothing to learn"
        yield Fault("nothing_to_learn", message, "add an answer, or remove the record", "strict")
    elif spoken[-1].role == "user":
        message = f"turn {spoken[-1].position}, the last, is from user: no answer follows"
        yield Fault("order", message, "add the assistant's answer, or remove the turn", "strict")


def _near_miss(key: str, found: dict[str, Any]) -> str:
    """Which key may have been meant, said in brackets; nothing where none is near."""
    near = difflib.get_close_matches(key, [str(other) for other in found], n=1)
    return f" (`{near[0]}` is near it)" if near else ""


def _json_type(value: Any) -> str:
    """A JSON value's type in JSON's own words."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return "null" if value is None else names.get(type(value), "a number")
