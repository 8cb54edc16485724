"""Parquet files and folders of them as records."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vltrain.data.checks import check_files
from vltrain.data.parquet_files import scan_parquet, scan_parquet_folder
from vltrain.data.records import Record, Unreadable


def write(path: Path, *ids: str | int, **options: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"id": list(ids)}), path, **options)
    return path


def ids_in(folder: Path, split: str | None = None) -> list[str]:
    entries = list(scan_parquet_folder(folder, split))
    assert all(isinstance(entry, Record) for entry in entries), entries
    return [entry.value["id"] for entry in entries]


def fault_of(entries) -> str:
    (entry,) = entries
    assert isinstance(entry, Unreadable)
    return entry.fault.message


def test_rows_are_numbered_through_all_row_groups(tmp_path):
    file = write(tmp_path / "a.parquet", "猫", "b", "c", "d", "e", row_group_size=2)

    records = list(scan_parquet(file))

    assert records == [Record(file, n, {"id": name}) for n, name in enumerate("猫bcde")]


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "the file is empty (0 bytes)"),
        (b"[1, 2]", "the file is not Parquet"),
        (b"PAR1", "the Parquet file is cut short or broken ("),
        (b"PAR1" + bytes(100) + b"PAR1", "the Parquet file is cut short or broken ("),
    ],
)
def test_a_file_that_is_no_whole_parquet_is_a_fault(tmp_path, content, what):
    (tmp_path / "a.parquet").write_bytes(content)

    assert what in fault_of(scan_parquet(tmp_path / "a.parquet"))


def test_every_length_that_a_file_can_be_cut_to_is_a_fault(tmp_path):
    whole = write(tmp_path / "a.parquet", *range(50)).read_bytes()
    cut = tmp_path / "cut.parquet"

    for length in range(0, len(whole), 7):
        cut.write_bytes(whole[:length])
        assert any(isinstance(entry, Unreadable) for entry in scan_parquet(cut)), length


def test_a_broken_row_group_is_named_and_the_others_are_read(tmp_path):
    names = [f"name {number}" for number in range(300)]
    file = write(tmp_path / "a.parquet", *names, row_group_size=100, compression="NONE")
    content = bytearray(file.read_bytes())
    second = pq.read_metadata(file).row_group(1).column(0)
    start = second.dictionary_page_offset
    content[start : start + second.total_compressed_size] = b"\xff" * second.total_compressed_size
    file.write_bytes(bytes(content))

    entries = list(scan_parquet(file))

    broken = [entry for entry in entries if isinstance(entry, Unreadable)]
    assert [entry.name for entry in broken] == ["a.parquet#100"]
    assert "what follows up to row 199 cannot be read" in broken[0].fault.message
    read = [entry.index for entry in entries if isinstance(entry, Record)]
    assert read == [*range(100), *range(200, 300)]


def test_memory_does_not_grow_with_a_row_group_of_pictures(tmp_path):
    noise = np.random.default_rng(0)
    pictures = [noise.bytes(10_000) for _ in range(5_000)]
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": pictures}), file)
    assert pq.read_metadata(file).num_row_groups == 1
    before = pa.total_allocated_bytes()

    peak = max(pa.total_allocated_bytes() - before for _ in scan_parquet(file))

    # Of 50 MB. The smallest that can be read is a page, and a page has 1024 rows: 10 MB, as it is
    # stored and as it is unpacked.
    assert peak < 35e6


def test_a_folders_files_are_read_by_name_and_those_in_its_folders(tmp_path):
    write(tmp_path / "b.parquet", "b")
    write(tmp_path / "a" / "z.PARQUET", "a/z")
    write(tmp_path / "a.parquet", "a")
    for name in (".hidden.parquet", "_left.parquet", "_left/a.parquet", ".cache/a.parquet"):
        write(tmp_path / name, "left out")
    (tmp_path / "README.md").write_text("about the data")
    (tmp_path / "dataset_infos.json").write_text("{}")

    assert ids_in(tmp_path) == ["a/z", "a", "b"]
    first = next(scan_parquet_folder(tmp_path, None))
    assert first.file == tmp_path / "a" / "z.PARQUET"


def test_of_shards_that_are_named_after_splits_one_split_is_read(tmp_path):
    for split, number in (("train", 1), ("test", 0), ("train", 0)):
        write(tmp_path / "data" / f"{split}-{number:05}-of-00002.parquet", f"{split} {number}")

    assert ids_in(tmp_path) == ["train 0", "train 1"]
    assert ids_in(tmp_path, "test") == ["test 0"]
    message = fault_of(scan_parquet_folder(tmp_path, "dev"))
    assert message == "the dataset has no split dev; it has test, train"


def test_where_one_name_says_no_split_all_files_are_read(tmp_path):
    write(tmp_path / "train-00000-of-00001.parquet", "train")
    write(tmp_path / "more.parquet", "more")

    assert ids_in(tmp_path) == ["more", "train"]


def test_other_data_in_a_folder_is_a_fault_that_names_it(tmp_path):
    write(tmp_path / "a.parquet", "a")
    (tmp_path / "more.jsonl").write_text("{}")

    message = fault_of(scan_parquet_folder(tmp_path, None))

    assert message == "the folder holds data that is not Parquet: more.jsonl"


def test_a_folder_without_data_is_a_fault(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")

    assert "no Parquet file" in fault_of(scan_parquet_folder(tmp_path, None))


def test_what_check_finds_in_rows_is_named_by_file_and_row(tmp_path):
    said = [{"from": "human", "value": "<image>猫?"}, {"from": "gpt", "value": "a"}]
    rows = [
        {"conversations": said, "image": None},
        {"conversations": said, "image": {"bytes": b"\x89PNG\r\n" + bytes(9000), "path": "a.png"}},
        {"conversations": None, "image": None},
        {"conversations": said[:1], "image": {"bytes": None, "path": "none.png"}},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")

    found = check_files([tmp_path / "a.parquet"]).findings

    assert [(finding.record, finding.kind) for finding in found] == [
        (0, "missing_pictures"),
        (1, "broken_picture"),
        (2, "no_conversations"),
        (3, "nothing_to_learn"),
        (3, "missing_picture"),
    ]
    assert max(len(finding.message) for finding in found) < 400  # without the picture's bytes


@pytest.mark.parametrize(
    "columns",
    [
        {"conversations": [1, 2]},
        {"conversations": ["text", "[1]"]},
        {"conversations": [["a"], ["b"]]},
        {"conversations": [[[{"from": "user"}]], [[]]]},
        {"messages": [[{"role": 1, "content": 2.5}], []]},
        {"messages": [[{"role": "user", "content": [[1]]}], None]},
        {"query": [b"\xff\xfe", b"\x89PNG\r\n"], "response": ["a", "b"]},
        {"question": ["q", "q"], "answer": ["a", "b"]},
        {"image": [b"", b"GIF8"], "query": ["<image>q"] * 2, "response": ["a", "b"]},
        {"images": [[[b"GIF8"]]] * 2, "query": ["<image>q"] * 2, "response": ["a", "b"]},
    ],
)
def test_columns_of_the_wrong_types_are_errors_of_every_row(tmp_path, columns):
    pq.write_table(pa.table(columns | {"id": [7, 8]}), tmp_path / "a.parquet")

    report = check_files([tmp_path / "a.parquet"])

    assert report.records == 2
    assert {finding.record for finding in report.errors} == {0, 1}
    assert {finding.id for finding in report.errors} == {"7", "8"}
