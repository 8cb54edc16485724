"""Rows of tables as records."""

import base64
import datetime
import decimal
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from vltrain.data.arrow_rows import batch_rows, data_uri, record_of_row, records_of_batch
from vltrain.data.formats import read_conversation
from vltrain.data.records import Record, Unreadable

FILE = Path("train.parquet")
PNG = b"\x89PNG\r\n\x1a\n"
PICTURE = {"path": "data:image/png;base64,iVBORw0KGgo="}


def batch_of(rows: list[dict]) -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist(rows)


def test_what_is_null_in_a_row_is_left_out_at_every_depth():
    turns = [{"from": "user", "value": "q", "weight": None}, {"from": "gpt", "value": None}]

    record = record_of_row({"id": None, "conversations": turns, "images": [None, "a.png"]})

    assert record == {
        "conversations": [{"from": "user", "value": "q"}, {"from": "gpt"}],
        "images": [None, "a.png"],
    }


def test_fields_that_only_some_turns_have_are_in_those_turns_alone():
    parts = [{"type": "image"}, {"type": "text", "text": "q"}]
    turns = [{"role": "user", "content": parts}]

    (record,) = records_of_batch(batch_of([{"messages": turns}]), FILE, 5)

    assert record == Record(FILE, 5, {"messages": turns})


def test_bytes_of_pictures_become_objects_with_a_data_uri_wherever_they_are():
    part = {"type": "image", "image": {"bytes": PNG, "path": "a.png"}}
    row = {
        "image": {"bytes": PNG, "path": None},
        "images": [{"bytes": PNG}, PNG],
        "messages": [{"role": "user", "content": [part]}],
    }

    assert record_of_row(row) == {
        "image": PICTURE,
        "images": [PICTURE, PICTURE],
        "messages": [{"role": "user", "content": [{"type": "image", "image": PICTURE}]}],
    }


def test_a_picture_without_bytes_keeps_its_path_and_one_without_both_is_none():
    row = {"images": [{"bytes": None, "path": "a.png"}], "image": {"bytes": None, "path": None}}

    assert record_of_row(row) == {"images": [{"path": "a.png"}]}


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"\x89PNG\r\n\x1a\n", "image/png"),
        (b"\xff\xd8\xff\xe0", "image/jpeg"),
        (b"GIF89a", "image/gif"),
        (b"RIFF\x10\0\0\0WEBPVP8 ", "image/webp"),
        (b"BM\x10\0\0\0\0\0\0\0", "image/bmp"),
        (b"II*\0", "image/tiff"),
        (b"MM\0*", "image/tiff"),
        (b"no picture", "application/octet-stream"),
        (b"", "application/octet-stream"),
    ],
)
def test_the_type_of_a_picture_is_told_by_its_first_bytes(content, kind):
    head, _, body = data_uri(content).partition(",")

    assert head == f"data:{kind};base64"
    assert base64.b64decode(body) == content


def test_text_that_is_stored_as_bytes_is_read_as_text():
    assert record_of_row({"query": "猫?".encode(), "response": b"BMW"}) == {
        "query": "猫?",
        "response": "BMW",
    }


@pytest.mark.parametrize("content", [PNG, b"\xff\xfe"])
def test_bytes_that_are_no_text_are_never_taken_as_what_is_said(content):
    value = record_of_row({"query": content, "response": b"a"})

    _, faults = read_conversation(value)

    assert [fault.message for fault in faults] == ["`query` is an object"]


def test_values_that_json_does_not_have_become_values_that_it_has():
    row = {
        "id": decimal.Decimal("7"),
        "score": decimal.Decimal("0.5"),
        "when": datetime.datetime(2024, 1, 2, 3, 4, 5),
        "tags": [("a", 1), ("b", None)],
        "grid": np.array([[1, 2], [3, 4]]),
        "half": np.float32(0.5),
    }

    record = record_of_row(row)

    assert record == {
        "id": 7,
        "score": 0.5,
        "when": "2024-01-02 03:04:05",
        "tags": {"a": 1},
        "grid": [[1, 2], [3, 4]],
        "half": 0.5,
    }
    assert json.loads(json.dumps(record)) == record


def test_turns_that_are_json_text_are_read():
    turns = [{"role": "user", "content": "猫"}]

    assert record_of_row({"messages": json.dumps(turns)}) == {"messages": turns}


@pytest.mark.parametrize("text", ["[1", "plain", '"a"', "9" * 5000, "[" * 100_000])
def test_text_that_is_no_list_and_no_object_stays_text(text):
    assert record_of_row({"messages": text}) == {"messages": text}


def test_turns_that_are_stored_as_a_struct_of_lists_are_a_list_of_turns():
    turns = {"from": ["user", "gpt"], "value": ["q", "a"], "weight": [None, 0]}

    assert record_of_row({"conversations": turns})["conversations"] == [
        {"from": "user", "value": "q"},
        {"from": "gpt", "value": "a", "weight": 0},
    ]


@pytest.mark.parametrize("turns", [{"from": ["user"], "value": []}, {"from": "user"}])
def test_a_struct_that_is_no_list_of_turns_stays_one(turns):
    assert record_of_row({"conversations": turns}) == {"conversations": turns}


def test_a_row_that_python_has_no_values_for_is_named_and_the_others_are_read():
    column = pa.array([b"a", b"\xff\xfe", b"c"]).view(pa.string())
    batch = pa.RecordBatch.from_arrays([column], ["id"])

    first, second, third = records_of_batch(batch, FILE, 10)

    assert (first, third) == (Record(FILE, 10, {"id": "a"}), Record(FILE, 12, {"id": "c"}))
    assert isinstance(second, Unreadable)
    assert second.name == "train.parquet#11"
    assert "the row cannot be read ('utf-8' codec can't decode" in second.fault.message


def test_records_say_about_how_many_bytes_they_hold():
    batch = batch_of([{"image": bytes(1000)}, {"image": bytes(3000)}])

    assert [2000 <= record.held_bytes <= 2100 for record in records_of_batch(batch, FILE, 0)] == [
        *(True, True)
    ]


@pytest.mark.parametrize(
    ("rows", "total_bytes", "expected"),
    [(10, 0, 1000), (10, 10 << 30, 1), (1_000_000, 1_000_000 << 10, 1000), (100, 100 << 20, 8)],
)
def test_rows_are_read_at_once_up_to_so_many_bytes(rows, total_bytes, expected):
    assert batch_rows(rows, total_bytes) == expected
