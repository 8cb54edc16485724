"""Faults of files, and of sets of records as a whole."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from forms import Turns, as_list, qwen_vl
from planted_faults import answered, asked


@dataclass(frozen=True)
class InFile:
    """A fault of a file; the finding is about the file, or about one of its lines."""

    name: str
    kind: str
    ending: str
    content: bytes
    record: int | None = None


_GOOD = qwen_vl(asked("[[good.png]]A question."))
_LINE = json.dumps(_GOOD).encode()
_LIST = as_list([_GOOD])


def broken(name: str, content: bytes) -> tuple[InFile, InFile]:
    """Broken JSON in a list and, as the one line between two good ones, in JSON lines."""
    other = json.dumps(qwen_vl(asked("Another question."))).encode()
    return (
        InFile(f"{name}, in a list", "not_json", ".json", b"[" + content + b"]"),
        InFile(
            f"{name}, in a line", "not_json", ".jsonl", _LINE + b"\n" + content + b"\n" + other, 1
        ),
    )


IN_FILE = (
    *broken("a comma at the end of an object", b'{"id": 1,}'),
    *broken("single quotes", b"{'id': 1}"),
    *broken("a key without quotes", b"{id: 1}"),
    *broken("a comment", b'// one\t{"id": 1}'),
    *broken("True as Python has it", b'{"id": True}'),
    *broken("a line break in a string", b'{"id": "a\tb"}'),
    *broken("no colon", b'{"id" 1}'),
    *broken("an escape that is none", b'{"id": "\\x41"}'),
    *broken("a number without an end", b'{"id": ' + b"9" * 5000 + b"}"),
    *broken("lists in lists without end", b"[" * 100_000),
    InFile("a list cut short", "not_json", ".json", _LIST[:-20]),
    InFile("a comma at the end of the list", "not_json", ".json", _LIST[:-2] + b",\n]"),
    InFile("no comma between records", "not_json", ".json", b"[" + _LINE + b" {}]"),
    InFile("two lists", "not_json", ".json", _LIST + _LIST),
    InFile("no bytes at all", "no_records", ".json", b""),
    InFile("no bytes in a .jsonl", "no_records", ".jsonl", b""),
    InFile("nothing but blanks", "no_records", ".jsonl", b"\n \r\n"),
    InFile("an empty list", "no_records", ".json", b"[]"),
    InFile("an object for the list", "not_a_list", ".json", b'{"data": []}'),
    InFile("a string for the list", "not_a_list", ".json", b'"data"'),
    InFile("null for the list", "not_a_list", ".json", b"null"),
    InFile("JSON lines under .json", "lines_as_list", ".json", _LINE + b"\n" + _LINE + b"\n"),
    InFile("a list under .jsonl", "list_as_lines", ".jsonl", _LIST),
    InFile("a list on one line under .jsonl", "list_as_lines", ".jsonl", b"[" + _LINE + b"]"),
    InFile("UTF-16 with its mark", "not_utf8", ".json", _LIST.decode().encode("utf-16")),
    InFile("UTF-16 without a mark", "not_utf8", ".json", _LIST.decode().encode("utf-16-le")),
    InFile("UTF-32", "not_utf8", ".json", _LIST.decode().encode("utf-32")),
    InFile("UTF-16 lines", "not_utf8", ".jsonl", _LINE.decode().encode("utf-16")),
    InFile("UTF-16 lines without a mark", "not_utf8", ".jsonl", _LINE.decode().encode("utf-16-be")),
    InFile("Latin-1", "not_utf8", ".json", '[{"id": "é"}]'.encode("latin-1")),
    InFile("GBK", "not_utf8", ".json", '[{"id": "狗"}]'.encode("gbk")),
    InFile("a line of Latin-1", "not_utf8", ".jsonl", _LINE + b"\n" + b'{"id": "\xe9"}\n', 1),
    InFile("a picture for a data file", "not_utf8", ".json", b"\x89PNG\r\n\x1a\n" + bytes(64)),
)


@dataclass(frozen=True)
class InSet:
    """A fault that shows in the whole; the finding is about a record, or about the file."""

    name: str
    kind: str
    conversations: Sequence[Turns]
    record: int | None


_USUAL = [asked(f"Question {number}?", f"Answer {number}.") for number in range(24)]
_PIXELS = [(3 * n, n, 160 + 5 * n, 110 + 4 * n) for n in range(6)]
IN_SET = (
    InSet("a record that is there twice", "duplicate", [*_USUAL[:4], _USUAL[1]], 4),
    InSet(
        "one answer to everything",
        "one_answer",
        [asked(f"Is it {n}?", "Yes.") for n in range(30)],
        None,
    ),
    InSet("a record that never ends", "odd_length", [*_USUAL, asked("q", "a word " * 700)], 24),
    InSet(
        "boxes in pixels",
        "pixel_boxes",
        [answered("<ref>it</ref><box>({},{}),({},{})</box>".format(*box)) for box in _PIXELS],
        None,
    ),
)
