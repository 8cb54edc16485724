"""Checking data once: what a run gets, what is kept, and when it is checked again."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from letters import LetterProcessor, record
from PIL import Image

from vltrain.config import DataConfig
from vltrain.data.checks import check_files
from vltrain.data.prepared import Prepared, prepare

LETTERS = LetterProcessor()


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    """Three records, one of them with a picture and one with a warning."""
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    values = [record("<img>a.png</img>q", "a"), record("q", "a" * 9), record("[q]", "b")]
    leading = {"from": "assistant", "value": "Hello"}
    values[2]["conversations"].insert(0, leading)
    (tmp_path / "train.json").write_text(json.dumps(values))
    return DataConfig(files=(tmp_path / "train.json",), cache_dir=tmp_path / "cache")


def prepared(data: DataConfig, processor: LetterProcessor = LETTERS) -> tuple[Prepared, str]:
    """What a run gets, and what it says."""
    lines: list[str] = []
    found = prepare(data, processor, say=lines.append)
    return found, "\n".join(lines)


def checked(data: DataConfig) -> bool:
    """Whether a run checks its data, though an earlier one may have."""
    return "checked in" in prepared(data)[1]


def rewrite(file: Path, *values: dict) -> None:
    file.write_text(json.dumps(values))


def test_a_run_gets_a_table_of_its_records_and_the_report_of_a_check(data):
    found, said = prepared(data)

    assert found.table.numbers["tokens"].tolist() == [38, 42, 36]
    assert found.table.record(1).value == record("q", "a" * 9)
    assert found.report == check_files(data.files, processor=LETTERS, max_length=data.max_length)
    assert [finding.kind for finding in found.report.findings] == ["leading_assistant"]
    assert said.startswith("data: 3 records checked in ")


def test_a_second_run_reads_what_the_first_has_kept_and_warns_again(data):
    first, _ = prepared(data)
    second, said = prepared(data)

    assert said.startswith("data: 3 records read from the cache, unchanged since they were checked")
    assert second.report == first.report
    numbers = [{k: v.tolist() for k, v in p.table.numbers.items()} for p in (first, second)]
    assert numbers[0] == numbers[1]
    assert [second.table.record(n) for n in range(3)] == [first.table.record(n) for n in range(3)]


def test_a_changed_data_file_is_checked_again(data):
    prepared(data)
    rewrite(data.files[0], record("q", "a"))

    found, said = prepared(data)

    assert "the files have changed since they were checked" in said
    assert len(found.table) == 1
    assert not checked(data)


@pytest.mark.parametrize("change", ["size", "time", "gone"])
def test_a_changed_picture_is_checked_again(data, change):
    prepared(data)
    picture = data.files[0].parent / "a.png"
    if change == "size":
        Image.new("RGB", (90, 40)).save(picture)
    elif change == "time":
        os.utime(picture, ns=(1, 1))
    else:
        picture.unlink()

    found, said = prepared(data)

    assert f"pictures have changed since they were checked, {picture} for one" in said
    errors = [finding.kind for finding in found.report.errors]
    assert errors == (["missing_picture"] if change == "gone" else [])


@pytest.mark.parametrize(
    "settings",
    [
        {"max_length": 100},
        {"too_long": "drop"},
        {"labels": "reference"},
        {"format": "qwen_vl"},
        {"image_root": Path("elsewhere")},
    ],
)
def test_what_changes_samples_or_findings_is_checked_for_itself(data, settings):
    prepared(data)

    assert checked(replace(data, **settings))
    assert not checked(data)


def test_another_vocabulary_is_encoded_for_itself(data):
    prepared(data)

    _, said = prepared(data, replace(LETTERS, fingerprint="other letters"))

    assert "checked in" in said


@pytest.mark.parametrize("settings", [{"packing": True}, {"eval_share": 0.5}])
def test_how_samples_are_shown_needs_no_other_check(data, settings):
    prepared(data)

    assert not checked(replace(data, **settings))


def test_files_with_errors_have_no_table_and_are_not_kept(data):
    rewrite(data.files[0], record("q", "a"), {}, record("q"))

    for _ in range(2):
        found, said = prepared(data)
        assert found.table is None
        assert [finding.record for finding in found.report.errors] == [1, 2]
        assert "checked in" in said
    assert not [path for path in (data.cache_dir / "samples").iterdir() if path.is_dir()]


def test_records_that_are_dropped_are_in_the_report_and_not_in_the_table(data):
    found, _ = prepared(replace(data, max_length=40, too_long="drop"))

    assert found.report.dropped == 1
    assert found.table.numbers["index"].tolist() == [0, 2]


def test_a_record_whose_bad_picture_was_mended_is_checked_again(data):
    picture = data.files[0].parent / "a.png"
    content = picture.read_bytes()
    dropping = replace(data, bad_pictures="drop")

    for bad in (None, b"no picture"):
        if bad is None:
            picture.unlink()
        else:
            picture.write_bytes(bad)
        found, _ = prepared(dropping)
        assert (len(found.table), found.report.dropped) == (2, 1)
        assert not checked(dropping)
    picture.write_bytes(content)
    found, said = prepared(dropping)

    assert f"{picture} for one" in said
    assert (len(found.table), found.report.dropped) == (3, 0)


def test_a_record_whose_boxes_lacked_their_picture_is_checked_again(data):
    value = {"query": "<image>q", "response": "<bbox>", "images": ["b.png"]}
    rewrite(data.files[0], record("q", "a"), value | {"objects": {"bbox": [[1, 1, 2, 2]]}})
    dropping = replace(data, bad_pictures="drop")

    assert len(prepared(dropping)[0].table) == 1
    Image.new("RGB", (4, 4)).save(data.files[0].parent / "b.png")

    assert len(prepared(dropping)[0].table) == 2


def test_files_to_evaluate_on_stand_behind_those_to_learn_from(data, tmp_path):
    rewrite(tmp_path / "eval.json", record("q", "a"))

    found, _ = prepared(replace(data, eval_files=(tmp_path / "eval.json",)))

    assert found.table.numbers["source"].tolist() == [0, 0, 0, 1]
    assert found.table.name(3) == "eval.json#0"


def test_records_of_a_folder_know_their_file_and_what_named_it(data, tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    for name, count in (("x", 1), ("y", 2)):
        rows = pa.Table.from_pylist([record("q", "a")] * count)
        pq.write_table(rows, folder / f"{name}.parquet")
    files = replace(data, files=(data.files[0], folder))

    found, _ = prepared(files)

    assert found.table.numbers["source"].tolist() == [0, 0, 0, 1, 1, 1]
    names = [found.table.name(number) for number in range(3, 6)]
    assert names == ["x.parquet#0", "y.parquet#0", "y.parquet#1"]
    assert not checked(files)

    pq.write_table(rows, folder / "z.parquet")
    assert checked(files)


def test_a_cut_off_entry_is_made_anew(data):
    prepared(data)
    (entry,) = (path for path in (data.cache_dir / "samples").iterdir() if path.is_dir())
    (entry / "report.json").unlink()

    assert checked(data)
    assert not checked(data)
