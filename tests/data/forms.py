"""One conversation written in every form that a data file can have.

In a text `[[path]]` stands for a picture.
"""

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

Turns = Sequence[tuple[str, str]]  # role and text
PICTURE = re.compile(r"\[\[(.*?)\]\]", re.DOTALL)


def qwen_vl(turns: Turns) -> dict[str, Any]:
    return {
        "conversations": [
            {"from": role, "value": PICTURE.sub(r"<img>\1</img>", text)} for role, text in turns
        ]
    }


def messages(turns: Turns) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": _parts(text)} for role, text in turns]}


def llava(turns: Turns) -> dict[str, Any]:
    names = {"user": "human", "assistant": "gpt"}
    record: dict[str, Any] = {"image": _pictures(turns)}
    if len(record["image"]) == 1:
        record["image"] = record["image"][0]
    record["conversations"] = [
        {"from": names.get(role, role), "value": PICTURE.sub("<image>", text)}
        for role, text in turns
    ]
    return record if record["image"] else {"conversations": record["conversations"]}


def sharegpt(turns: Turns) -> dict[str, Any]:
    said = [{"role": role, "content": PICTURE.sub("<image>", text)} for role, text in turns]
    return {"messages": said, "images": _pictures(turns), "source": "by hand"}


def swift(turns: Turns) -> dict[str, Any]:
    """`query` and `response`, which hold turns of user and assistant alone."""
    record: dict[str, Any] = {"images": _pictures(turns)}
    if turns[0][0] == "system":
        record["system"], turns = turns[0][1], turns[1:]
    assert [role for role, _ in turns] == ["user", "assistant"] * (len(turns) // 2)
    said = [PICTURE.sub("<image>", text) for _, text in turns]
    record["history"] = [said[place : place + 2] for place in range(0, len(said) - 2, 2)]
    record["query"], record["response"] = said[-2:]
    return record


def _parts(text: str) -> str | list[dict[str, Any]]:
    """The parts of a turn, or its text where it has no picture."""
    pieces = PICTURE.split(text)
    if len(pieces) == 1:
        return text
    parts = [
        {"type": "image", "image": piece} if place % 2 else {"type": "text", "text": piece}
        for place, piece in enumerate(pieces)
    ]
    return [part for part in parts if part.get("text") != ""]


def _pictures(turns: Turns) -> list[str]:
    return [path for _, text in turns for path in PICTURE.findall(text)]


def as_list(records: Sequence[Any]) -> bytes:
    return json.dumps(records, ensure_ascii=False, indent=1).encode()


def as_lines(records: Sequence[Any]) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


Form = tuple[Callable[[Turns], dict[str, Any]], Callable[[Sequence[Any]], bytes], str]
FORMS: dict[str, Form] = {  # name -> how a record is written, how a file, and its ending
    "qwen_vl": (qwen_vl, as_list, ".json"),
    "qwen_vl_lines": (qwen_vl, as_lines, ".jsonl"),
    "messages": (messages, as_lines, ".jsonl"),
    "llava": (llava, as_list, ".json"),
    "sharegpt": (sharegpt, as_list, ".json"),
    "swift": (swift, as_lines, ".jsonl"),
}
