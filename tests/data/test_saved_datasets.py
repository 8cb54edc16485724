"""Datasets that `save_to_disk` wrote, as records."""

from pathlib import Path

import datasets
import pytest

from vltrain.data.records import Record, Unreadable
from vltrain.data.saved_datasets import is_saved_dataset, scan_saved_dataset

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()


def dataset_of(*ids: str) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"id": list(ids)})


def scanned(folder: Path, split: str | None = None) -> list[Record | Unreadable]:
    return list(scan_saved_dataset(folder, split, folder))


def fault_of(folder: Path, split: str | None = None) -> str:
    (entry,) = scanned(folder, split)
    assert isinstance(entry, Unreadable)
    assert entry.index is None
    return entry.fault.message


def test_a_dataset_is_read_in_its_order(tmp_path):
    folder = tmp_path / "saved"
    dataset_of(*"abcd").filter(lambda row: row["id"] != "b").select([2, 0]).save_to_disk(folder)

    assert is_saved_dataset(folder)
    assert scanned(folder) == [Record(folder, 0, {"id": "d"}), Record(folder, 1, {"id": "a"})]


def test_pictures_are_given_as_they_were_stored_and_not_decoded(tmp_path):
    features = datasets.Features({"image": datasets.Image()})
    rows = [{"image": {"bytes": PNG, "path": None}}, {"image": None}]
    datasets.Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "saved")

    assert [record.value for record in scanned(tmp_path / "saved")] == [
        {"image": {"path": "data:image/png;base64,iVBORw0KGgo="}},
        {},
    ]


def test_a_format_that_was_set_before_saving_changes_nothing(tmp_path):
    saved = datasets.Dataset.from_dict({"id": [1, 2], "conversations": [["q"], ["a"]]})
    saved.with_format("numpy", columns=["id"]).save_to_disk(tmp_path / "saved")

    assert scanned(tmp_path / "saved")[0].value == {"id": 1, "conversations": ["q"]}


def test_of_several_splits_one_is_read(tmp_path):
    splits = {"test": dataset_of("t"), "train": dataset_of("a")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")

    assert is_saved_dataset(tmp_path / "saved")
    assert [record.value["id"] for record in scanned(tmp_path / "saved")] == ["a"]
    assert [record.value["id"] for record in scanned(tmp_path / "saved", "test")] == ["t"]
    assert "no split dev; it has test, train" in fault_of(tmp_path / "saved", "dev")


def test_a_split_of_a_dataset_without_splits_is_a_fault(tmp_path):
    dataset_of("a").save_to_disk(tmp_path / "saved")

    assert "no splits, and train is asked for" in fault_of(tmp_path / "saved", "train")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("data-00000-of-00001.arrow", None),
        ("data-00000-of-00001.arrow", b""),
        ("data-00000-of-00001.arrow", b"no Arrow"),
        ("state.json", b"{"),
        ("state.json", b"{}"),
        ("state.json", b"[]"),
        ("dataset_info.json", None),
        ("dataset_info.json", b'{"features": 3}'),
        ("dataset_info.json", b'{"features": {"id": {"_type": "NoSuchType"}}}'),
    ],
)
def test_a_broken_dataset_is_a_fault(tmp_path, name, content):
    dataset_of("a").save_to_disk(tmp_path)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content)

    assert fault_of(tmp_path).startswith("the saved dataset is broken (")


def test_a_dataset_that_is_cut_short_is_a_fault(tmp_path):
    dataset_of(*map(str, range(500))).save_to_disk(tmp_path)
    file = tmp_path / "data-00000-of-00001.arrow"
    file.write_bytes(file.read_bytes()[:-1000])

    assert fault_of(tmp_path).startswith("the saved dataset is broken (")


def test_splits_that_are_named_wrong_are_a_fault(tmp_path):
    datasets.DatasetDict({"train": dataset_of("a")}).save_to_disk(tmp_path)
    (tmp_path / "dataset_dict.json").write_text("{}")

    assert fault_of(tmp_path).startswith("the saved dataset is broken (")
