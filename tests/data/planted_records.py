"""Faults of a record's own form: its keys, their types, and what stands beside its turns."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from planted_faults import Severity

Mutate = Callable[[dict[str, Any]], Any]


@dataclass(frozen=True)
class InKeys:
    """A fault of a record's own form; `forms` are those that can have it."""

    name: str
    kind: str
    change: Mutate  # a good record -> the faulty one
    forms: tuple[str, ...]
    severity: Severity = "error"


LISTS = ("qwen_vl", "qwen_vl_lines", "messages", "llava", "sharegpt")
BESIDE = ("llava", "sharegpt", "swift")
EVERY = (*LISTS, "swift")


def turns_of(record: dict[str, Any]) -> list[Any]:
    return record[list_of(record)]


def list_of(record: dict[str, Any]) -> str:
    return "messages" if "messages" in record else "conversations"


def renamed(record: dict[str, Any], old: str, new: str) -> dict[str, Any]:
    return {new if key == old else key: value for key, value in record.items()}


def first_turn(change: Callable[[dict[str, Any]], Any]) -> Mutate:
    """Change the first turn."""

    def changed(record: dict[str, Any]) -> Any:
        turns = turns_of(record)
        return {**record, list_of(record): [change(turns[0]), *turns[1:]]}

    return changed


def last_turn(**keys: Any) -> Mutate:
    """Add keys to the last turn."""

    def changed(record: dict[str, Any]) -> Any:
        turns = turns_of(record)
        return {**record, list_of(record): [*turns[:-1], {**turns[-1], **keys}]}

    return changed


def speaker(turn: dict[str, Any]) -> str:
    return "from" if "from" in turn else "role"


def words(turn: dict[str, Any]) -> str:
    return "value" if "value" in turn else "content"


def listed(value: Any) -> Mutate:
    """Put something else in place of the list of turns."""
    return lambda record: {**record, list_of(record): value}


def put(**keys: Any) -> Mutate:
    return lambda record: {**record, **keys}


def without(key: str) -> Mutate:
    return lambda record: {name: value for name, value in record.items() if name != key}


IN_KEYS = (
    InKeys("null for a record", "not_an_object", lambda record: None, EVERY),
    InKeys("a string for a record", "not_an_object", lambda record: "q", EVERY),
    InKeys("a number for a record", "not_an_object", lambda record: 7, EVERY),
    InKeys("a list in the list", "not_an_object", lambda record: [record], EVERY),
    InKeys("an empty record", "no_conversations", lambda record: {}, EVERY),
    InKeys(
        "a misspelt list",
        "no_conversations",
        lambda record: renamed(record, list_of(record), list_of(record)[:-1]),
        LISTS,
    ),
    InKeys("null for the turns", "no_conversations", listed(None), LISTS),
    InKeys("a string for the turns", "no_conversations", listed("q"), LISTS),
    InKeys("no turns", "empty_conversation", listed([]), LISTS),
    InKeys("null for a turn", "bad_turn", first_turn(lambda turn: None), LISTS),
    InKeys("a string for a turn", "bad_turn", first_turn(lambda turn: "q"), LISTS),
    InKeys(
        "a misspelt speaker",
        "bad_turn",
        first_turn(lambda turn: renamed(turn, speaker(turn), speaker(turn)[:-1])),
        LISTS,
    ),
    InKeys(
        "misspelt words",
        "bad_turn",
        first_turn(lambda turn: renamed(turn, words(turn), words(turn) + "s")),
        LISTS,
    ),
    InKeys(
        "null for the words",
        "bad_turn",
        first_turn(lambda turn: {**turn, words(turn): None}),
        LISTS,
    ),
    InKeys(
        "a number for the words",
        "bad_turn",
        first_turn(lambda turn: {**turn, words(turn): 5}),
        LISTS,
    ),
    InKeys(
        "null for the speaker",
        "bad_turn",
        first_turn(lambda turn: {**turn, speaker(turn): None}),
        LISTS,
    ),
    InKeys(
        "an object for the speaker",
        "bad_turn",
        first_turn(lambda turn: {**turn, speaker(turn): {}}),
        LISTS,
    ),
    InKeys("a turn without keys", "bad_turn", first_turn(lambda turn: {}), LISTS),
    InKeys("a weight of 2", "bad_weight", last_turn(weight=2), LISTS),
    InKeys("a weight of a half", "bad_weight", last_turn(weight=0.5), LISTS),
    InKeys("a weight in words", "bad_weight", last_turn(weight="none"), LISTS),
    InKeys("weights of 0 alone", "nothing_to_learn", last_turn(weight=0), LISTS),
    InKeys("a list for the system", "bad_turn", put(system=["s"]), EVERY),
    InKeys(
        "more pictures than <image>",
        "unplaced_pictures",
        put(images=["good.png"] * 2),
        BESIDE,
        "warning",
    ),
    InKeys("a number for a picture", "bad_pictures", put(images=[5]), BESIDE),
    InKeys("null for a picture", "bad_pictures", put(images=[None]), BESIDE),
    InKeys("an object without a path for a picture", "bad_pictures", put(images=[{}]), BESIDE),
    InKeys("an empty path beside the turns", "empty_path", put(images=[""]), BESIDE),
    InKeys(
        "pictures under a misspelt key",
        "missing_pictures",
        lambda record: renamed(renamed(record, "image", "imagse"), "images", "imagse"),
        BESIDE,
    ),
    InKeys(
        "a part of an unknown type",
        "bad_part",
        first_turn(lambda turn: {**turn, "content": [{"type": "video", "video": "a.mp4"}]}),
        ("messages",),
    ),
    InKeys(
        "a part that is a string",
        "bad_part",
        first_turn(lambda turn: {**turn, "content": ["q"]}),
        ("messages",),
    ),
    InKeys(
        "a text part without text",
        "bad_part",
        first_turn(lambda turn: {**turn, "content": [{"type": "text"}]}),
        ("messages",),
    ),
    InKeys(
        "a picture part of null",
        "bad_part",
        first_turn(lambda turn: {**turn, "content": [{"type": "image_url", "image_url": None}]}),
        ("messages",),
    ),
    InKeys(
        "no parts", "empty_turn", first_turn(lambda turn: {**turn, "content": []}), ("messages",)
    ),
    InKeys("no response", "bad_turn", without("response"), ("swift",)),
    InKeys(
        "a misspelt response",
        "bad_turn",
        lambda record: renamed(record, "response", "respones"),
        ("swift",),
    ),
    InKeys("null for the query", "bad_turn", put(query=None), ("swift",)),
    InKeys("a string for the history", "bad_turn", put(history="q"), ("swift",)),
    InKeys(
        "three texts in a pair of the history",
        "bad_turn",
        put(history=[["q", "a", "r"]]),
        ("swift",),
    ),
    InKeys(
        "a string that is not JSON for the objects", "bad_objects", put(objects="{"), ("swift",)
    ),
    InKeys(
        "a box of three numbers in the objects",
        "malformed_box",
        put(response="<bbox>", objects={"bbox": [[1, 2, 3]]}),
        ("swift",),
    ),
    InKeys(
        "an unknown unit of boxes",
        "bad_objects",
        put(response="<bbox>", objects={"bbox": [[1, 2, 3, 4]], "bbox_type": "cm"}),
        ("swift",),
    ),
    InKeys(
        "fewer boxes than places",
        "missing_objects",
        put(response="<bbox><bbox>", objects={"bbox": [[1, 2, 3, 4]], "bbox_type": "norm1000"}),
        ("swift",),
    ),
    InKeys(
        "more boxes than places",
        "unplaced_objects",
        put(response="a", objects={"bbox": [[1, 2, 3, 4]]}),
        ("swift",),
        "warning",
    ),
    InKeys(
        "a box on a picture that is not there",
        "bad_objects",
        put(response="<bbox>", objects={"bbox": [[1, 2, 3, 4]], "image_id": [4]}),
        ("swift",),
    ),
)
