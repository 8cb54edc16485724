"""Features of pictures on the disk: kept whole, found by a file's path, size and time."""

import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from letters import LetterProcessor
from PIL import Image

from vltrain.data.collation import Collator
from vltrain.data.dataset import RecordReader, SampleDataset
from vltrain.data.feature_store import FeatureStore, feature_key, picture_hash
from vltrain.data.records import Record
from vltrain.errors import VltrainError

FEATURES = torch.arange(6, dtype=torch.float32).view(2, 3)


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    store = FeatureStore(tmp_path / "features" / "key", "image_embeds", (2, 3), "float32")
    store.open()
    return store


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.new("RGB", (4, 4), "red").save(tmp_path / "red.png")
    return tmp_path / "red.png"


def keep(store: FeatureStore, picture: Path, features: torch.Tensor = FEATURES) -> str:
    digest = picture_hash(picture.read_bytes())
    store.keep(digest, features)
    store.link(store.place_of(picture), digest)
    return digest


def test_what_was_kept_of_a_picture_is_found(store, picture):
    keep(store, picture)

    assert torch.equal(store.find(picture), FEATURES)
    assert torch.equal(store.find(picture.read_bytes()), FEATURES)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_features_come_back_to_the_bit(tmp_path, picture, dtype):
    store = FeatureStore(tmp_path / "features" / dtype, "image_embeds", (5, 7), dtype)
    features = torch.randn(5, 7).to(getattr(torch, dtype))
    keep(store, picture, features)

    assert torch.equal(store.find(picture), features)


def test_nothing_is_found_of_another_picture(store, picture, tmp_path):
    keep(store, picture)
    Image.new("RGB", (4, 4), "blue").save(tmp_path / "blue.png")

    assert store.find(tmp_path / "blue.png") is None
    assert store.find(tmp_path / "missing.png") is None
    assert store.find(b"bytes") is None


def test_a_picture_that_has_changed_has_no_features(store, picture):
    keep(store, picture)
    Image.new("RGB", (5, 4), "red").save(picture)

    assert store.find(picture) is None


def test_a_picture_of_the_same_size_and_another_time_has_no_features(store, picture):
    keep(store, picture)
    os.utime(picture, ns=(0, picture.stat().st_mtime_ns + 1))

    assert store.find(picture) is None


@pytest.mark.parametrize("size", [0, 10, 23, 25])
def test_a_file_of_another_size_is_not_read(store, picture, size):
    digest = keep(store, picture)
    os.truncate(store.place_of_content(digest), size)

    assert store.find(picture) is None
    assert not store.holds(store.place_of(picture))


def test_a_link_to_features_that_were_deleted_leads_nowhere(store, picture):
    store.place_of_content(keep(store, picture)).unlink()

    assert store.find(picture) is None


def test_writing_to_features_changes_no_file(store, picture):
    keep(store, picture)
    store.find(picture).zero_()

    assert torch.equal(store.find(picture), FEATURES)


def test_the_room_counts_the_features_of_all_keys(store, picture):
    keep(store, picture)
    other = FeatureStore(store.folder.parent / "other", "image_embeds", (2, 3), "float32")
    other.open()
    keep(other, picture)

    assert store.room(5 * 24) == 3
    assert store.room(2 * 24) == 0
    assert store.room(0) == 0


def test_features_that_nobody_has_used_for_a_month_are_removed(store, picture):
    keep(store, picture)
    month = 31 * 24 * 3600
    os.utime(store.folder, (time.time() - month, time.time() - month))
    FeatureStore(store.folder.parent / "other", "image_embeds", (2, 3), "float32").open()

    assert not store.folder.exists()


def test_a_half_that_a_process_left_is_cleared_away(store, picture):
    place = store.place_of_content(keep(store, picture))
    old, new = place.with_name("old.1.part"), place.with_name("new.2.part")
    for part in (old, new):
        part.write_bytes(b"half")
    os.utime(old, (0, 0))
    store.open()

    assert not old.exists()
    assert new.exists()  # somebody may be writing it


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "features").write_text("a file")
    store = FeatureStore(tmp_path / "features" / "key", "image_embeds", (2, 3), "float32")

    with pytest.raises(VltrainError, match="cannot be written"):
        store.open()


def test_keys_differ_where_a_part_does():
    assert feature_key(["a", "b"]) != feature_key(["ab", ""])
    assert feature_key(["a", "b"]) == feature_key(["a", "b"])


def keep_often(store: FeatureStore, picture: Path) -> None:
    for _ in range(50):
        keep(store, picture)


def test_processes_that_keep_the_same_at_once_do_no_harm(store, picture):
    keep(store, picture)
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=keep_often, args=(store, picture)) for _ in range(2)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert torch.equal(store.find(picture), FEATURES)
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert list(store.folder.rglob("*.part")) == []


@pytest.mark.slow
def test_a_process_killed_while_it_writes_leaves_no_half_that_is_read(tmp_path):
    program = """
import sys, torch
from pathlib import Path
from vltrain.data.feature_store import FeatureStore
store = FeatureStore(Path(sys.argv[1]), "image_embeds", (512, 512), "float32")
print("writes", flush=True)
number = 0
while True:
    store.keep(f"{number:064x}", torch.full((512, 512), float(number)))
    number += 1
"""
    folder = tmp_path / "features" / "key"
    store = FeatureStore(folder, "image_embeds", (512, 512), "float32")
    for wait in (0.05, 0.1, 0.2):
        writer = subprocess.Popen(
            [sys.executable, "-c", program, str(folder)], stdout=subprocess.PIPE
        )
        assert writer.stdout.readline() == b"writes\n"
        time.sleep(wait)
        writer.kill()
        writer.wait()
        files = [file for file in folder.glob("pictures/*/*") if not file.name.endswith(".part")]
        for file in files:
            features = store.read(file)
            assert torch.equal(features, torch.full((512, 512), float(int(file.name, 16))))


def dataset_of(tmp_path: Path, store: FeatureStore, *colors: str) -> SampleDataset:
    """One sample for each colour, with a picture of it."""
    records = []
    for number, color in enumerate(colors):
        Image.new("RGB", (4, 4), color).save(tmp_path / f"{color}.png")
        turns = [
            {"from": "user", "value": f"<img>{color}.png</img>?"},
            {"from": "assistant", "value": "a"},
        ]
        records.append(Record(tmp_path / "data.json", number, {"conversations": turns}))
    dataset = SampleDataset.of_records(records, LetterProcessor())
    dataset.reader = RecordReader(LetterProcessor(), features=store)
    return dataset


def test_a_picture_that_is_kept_is_not_opened(tmp_path, store, monkeypatch):
    dataset = dataset_of(tmp_path, store, "red")
    keep(store, tmp_path / "red.png")
    monkeypatch.setattr(Image, "open", lambda *_: pytest.fail("it is opened"))

    batch = Collator(0)([dataset[0]])

    assert torch.equal(batch["image_embeds"], FEATURES[None])
    assert "pixel_values" not in batch
    assert "picture_order" not in batch


def test_a_batch_says_which_of_its_pictures_have_pixels(tmp_path, store):
    dataset = dataset_of(tmp_path, store, "red", "lime", "blue", "white")
    keep(store, tmp_path / "lime.png", FEATURES)
    keep(store, tmp_path / "white.png", FEATURES + 1)

    batch = Collator(0)([dataset[number] for number in range(4)])

    assert torch.equal(batch["image_embeds"], torch.stack([FEATURES, FEATURES + 1]))
    assert batch["pixel_values"].flatten(1).tolist() == [[255, 0, 0], [0, 0, 255]]
    assert batch["picture_order"].tolist() == [2, 0, 3, 1]


def test_a_batch_of_which_nothing_is_kept_has_pixels_alone(tmp_path, store):
    dataset = dataset_of(tmp_path, store, "red")

    batch = Collator(0)([dataset[0]])

    assert batch["pixel_values"].flatten().tolist() == [255, 0, 0]
    assert {"image_embeds", "picture_order"}.isdisjoint(batch)


def test_a_kept_picture_whose_file_is_gone_is_missing_all_the_same(tmp_path, store):
    dataset = dataset_of(tmp_path, store, "red")
    keep(store, tmp_path / "red.png")
    (tmp_path / "red.png").unlink()

    with pytest.raises(VltrainError, match=r"data\.json#0: picture 'red\.png' is missing"):
        dataset[0]
