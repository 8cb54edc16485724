"""Data files to records."""

import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from letters import record

from vltrain.data.records import Record
from vltrain.data.sources import read_records
from vltrain.errors import VltrainError


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_json_list_is_read_with_or_without_a_byte_order_mark(tmp_path, mark):
    file = written(tmp_path / "train.json", mark + '[{"a": "猫"}, 2]')

    assert read_records(file) == [Record(file, 0, {"a": "猫"}), Record(file, 1, 2)]


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_jsonl_lines_keep_their_numbers_though_empty_ones_are_skipped(tmp_path, mark, line_end):
    text = mark + line_end.join(['{"a": "\u2028"}', "", "  ", '{"b": 2}'])
    file = written(tmp_path / "train.jsonl", text)

    assert read_records(file) == [Record(file, 0, {"a": "\u2028"}), Record(file, 3, {"b": 2})]


def test_a_record_is_named_by_file_and_number():
    assert Record(Path("data/train.json"), 17, {}).name == "train.json#17"


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("a.json", "", "the file holds no record"),
        ("a.json", "[]", "the file holds no record"),
        ("a.jsonl", "\n\n", "the file holds no record"),
        ("a.json", '{"id": 1}', "the file is not a list of records"),
        ("a.json", '{"id": 1}\n{"id": 2}\n', "one JSON record per line, not a JSON list"),
        ("a.json", '[{"id": 1},\n{"id": }]', "not JSON: line 2, column 8"),
        ("a.json", "[1, 2", "not JSON: line 1"),
        ("a.json", "[" * 100_000, "not JSON: line 1"),
        ("a.json", f"[{'9' * 5000}]", "not JSON: line 1"),
        ("a.json", '["caf\xe9"]'.encode("latin-1"), "line 1 is not UTF-8"),
        ("a.json", '["x"]'.encode("utf-16"), "the file is UTF-16 or UTF-32, not UTF-8"),
        ("a.jsonl", '{"a": 1}\n{}\n'.encode("utf-16"), "the file is UTF-16 or UTF-32, not UTF-8"),
        ("a.jsonl", '[{"id": 1}]', "the file is a JSON list, not one record per line"),
        ("a.jsonl", '{"a": 1}\n{"a": \n', "#1: not JSON: line 2"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_with_its_line(tmp_path, name, content, what):
    with pytest.raises(VltrainError, match=f"{name}.*{what}"):
        read_records(written(tmp_path / name, content))


def test_every_bad_line_is_in_the_error(tmp_path):
    file = written(tmp_path / "a.jsonl", "{\n{}\n}\n")

    with pytest.raises(VltrainError) as caught:
        read_records(file)

    assert "a.jsonl#0: " in str(caught.value)
    assert "a.jsonl#2: " in str(caught.value)


def test_a_file_that_is_not_there_is_an_error_with_its_path(tmp_path):
    with pytest.raises(VltrainError, match=r"nowhere\.json cannot be read \(No such file"):
        read_records(tmp_path / "nowhere.json")


def test_json_of_records_is_left_as_it_is(tmp_path):
    value = record("q", "a", id=3, extra=[1.5, None])
    file = written(tmp_path / "a.json", json.dumps([value]))

    assert read_records(file)[0].value == value


def ids(path: Path) -> list[str]:
    return [record.value["id"] for record in read_records(path)]


def test_parquet_is_told_by_its_ending_or_by_how_it_begins(tmp_path):
    for name in ("a.parquet", "b.PARQUET", "c.data"):
        pq.write_table(pa.table({"id": [name]}), tmp_path / name)

        assert ids(tmp_path / name) == [name]


def test_a_table_without_rows_holds_no_record(tmp_path):
    pq.write_table(pa.table({"id": pa.array([], pa.string())}), tmp_path / "a.parquet")

    with pytest.raises(VltrainError, match="the file holds no record"):
        read_records(tmp_path / "a.parquet")


def test_a_folder_is_a_saved_dataset_or_parquet_files(tmp_path):
    (tmp_path / "shards").mkdir()
    pq.write_table(pa.table({"id": ["shard"]}), tmp_path / "shards" / "a.parquet")
    datasets.Dataset.from_dict({"id": ["saved"]}).save_to_disk(tmp_path / "saved")

    assert ids(tmp_path / "shards") == ["shard"]
    assert ids(tmp_path / "saved") == ["saved"]


def test_a_split_is_named_behind_its_folder_and_in_errors(tmp_path):
    splits = {name: datasets.Dataset.from_dict({"id": [name]}) for name in ("train", "test")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")

    (record,) = read_records(tmp_path / "saved:test")

    assert (record.value, record.name) == ({"id": "test"}, "saved:test#0")
    with pytest.raises(VltrainError, match="saved:dev: the dataset has no split dev"):
        read_records(tmp_path / "saved:dev")


def test_a_file_whose_name_ends_like_a_split_is_a_file(tmp_path):
    file = written(tmp_path / "odd:train", '[{"id": "odd"}]')

    assert ids(file) == ["odd"]


@pytest.mark.parametrize("name", ["nowhere", "no/where.json", "no/where.parquet", "a/b/c:train"])
def test_what_is_not_there_and_no_name_on_the_hub_is_a_wrong_path(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)

    with pytest.raises(VltrainError, match="cannot be read") as caught:
        read_records(Path(name))
    assert "mend the path" in str(caught.value)
