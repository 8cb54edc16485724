"""Inputs that nobody would write: good ones that were damaged, and noise (hypothesis)."""

import copy
import io
import json
from typing import Any

from forms import FORMS, as_lines, as_list
from hypothesis import strategies as st
from PIL import Image
from planted_faults import answered, asked

_WORDS = [
    *("<img>", "</img>", "<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>", "<image>"),
    *("<bbox>", "<ref-object>", "<|im_end|>", "<imgpad>", "<|box_start|>", "good.png", "data:"),
    *("(1,2),(3,4)", "(", ")", ",", "-", "1000", "999999999999", "0.5", "１", "猫", "\ud800", "\0"),
    *("data:image/png;base64,", "https://x/a.png", "file:", "://", "\n", " ", "\u2028", "{", "["),
]
MARKUP = st.lists(st.sampled_from(_WORDS) | st.text(max_size=3), max_size=12).map("".join)
_LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-3, 2000)
    | st.floats()
    | MARKUP
    | st.sampled_from(["user", "assistant", "system", "gpt", "bot", "real", "norm1", ""])
)
_KEYS = st.sampled_from(
    [
        *("from", "value", "role", "content", "conversations", "messages", "images", "image"),
        *("system", "query", "response", "history", "objects", "bbox", "ref", "bbox_type"),
        *("type", "text", "url", "image_url", "path", "weight", "id", "image_id", "caption", "x"),
    ]
)
ANYTHING = st.recursive(
    _LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_KEYS, inner, max_size=4),
    max_leaves=8,
)
_OBJECTS = {"ref": ["cat"], "bbox": [[1, 2, 30, 40]], "bbox_type": "real", "image_id": [0]}
_GOOD: list[Any] = [
    write(turns)
    for write, _, _ in FORMS.values()
    for turns in (
        asked("[[good.png]]What?"),
        answered("<ref>it</ref><box>(10,20),(800,900)</box>, <quad>(1,2),(3,4),(5,6),(7,8)</quad>"),
        [("system", "s"), *asked("q", "a"), *asked("[[good.png]][[good.png]]r", "b")],
    )
]  # fmt: skip
_GOOD.append(
    {**FORMS["swift"][0](asked("[[good.png]]<ref-object>?", "<bbox>")), "objects": _OBJECTS}
)


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every place in a value as its container and its key."""
    keys = value.keys() if isinstance(value, dict) else range(len(value))
    inner = [(value, key) for key in keys]
    for key in keys:
        if isinstance(value[key], dict | list):
            inner += _places(value[key])
    return inner


@st.composite
def damaged_records(draw: st.DrawFn) -> Any:
    """A good record of any form with one to three things in it replaced, renamed or removed."""
    record = {"": copy.deepcopy(draw(st.sampled_from(_GOOD)))}
    for _ in range(draw(st.integers(1, 3))):
        container, key = draw(st.sampled_from(_places(record)))
        how = draw(st.sampled_from(["replace", "remove", "rename", "repeat"]))
        if how == "replace":
            container[key] = draw(ANYTHING)
        elif container is not record and how == "remove":
            del container[key]
        elif container is not record and isinstance(container, dict):
            container[draw(_KEYS)] = container.pop(key) if how == "rename" else container[key]
        elif isinstance(container, list):
            container.append(container[key])
    return record[""]


@st.composite
def damaged_bytes(draw: st.DrawFn, whole: bytes) -> bytes:
    """Bytes of which some were changed, put in or cut off."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(content)))
        end = start + draw(st.sampled_from([0, 0, 1, 2, 4, 50]))
        content[start:end] = draw(st.binary(max_size=4))
    return bytes(content[: draw(st.sampled_from([len(content)] * 3 + [len(content) // 2, 20]))])


def _file_of(records: list[Any], ending: str) -> bytes:
    """A data file; halves of surrogate pairs stay escapes."""
    if ending == ".jsonl":
        return as_lines(records)
    return json.dumps(records).encode() if records else as_list(records)


@st.composite
def damaged_files(draw: st.DrawFn) -> tuple[str, bytes]:
    """A data file's ending and its bytes."""
    records = draw(st.lists(damaged_records(), max_size=3))
    written = _file_of(records, draw(st.sampled_from([".json", ".jsonl"])))
    if draw(st.booleans()):
        written = b"\xef\xbb\xbf" + written
    ending = draw(st.sampled_from([".json", ".jsonl"]))
    return ending, draw(damaged_bytes(written) | st.binary(max_size=60))


def _picture_bytes() -> list[bytes]:
    """A small good file of every kind of picture."""
    found = []
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"):
        with io.BytesIO() as file:
            Image.effect_noise((16, 12), 90).save(file, kind)
            found.append(file.getvalue())
    return found


PICTURES = st.sampled_from(_picture_bytes()).flatmap(damaged_bytes)
