"""Records to samples with pictures."""

import base64
import pickle
from pathlib import Path

import numpy as np
import pytest
from letters import LetterProcessor, record
from PIL import Image

from vltrain.data.dataset import RecordReader, SampleDataset, split_numbers
from vltrain.data.records import Record
from vltrain.errors import VltrainError

LETTERS = LetterProcessor()


def records_of(*values):
    return [Record(Path("train.json"), index, value) for index, value in enumerate(values)]


def test_a_split_is_the_same_for_the_same_seed_and_keeps_the_order():
    train, held_out = split_numbers(20, share=0.25, seed=3)

    again = split_numbers(20, share=0.25, seed=3)
    assert [half.tolist() for half in again] == [train.tolist(), held_out.tolist()]
    assert held_out.tolist() != split_numbers(20, share=0.25, seed=4)[1].tolist()
    assert (len(train), len(held_out)) == (15, 5)
    assert sorted([*train, *held_out]) == list(range(20))
    assert sorted(train) == train.tolist()


def test_a_split_without_a_share_holds_nothing_out():
    train, held_out = split_numbers(2, share=0, seed=1)

    assert (train.tolist(), held_out.tolist()) == ([0, 1], [])


def test_a_small_share_holds_out_one_sample():
    assert len(split_numbers(3, share=0.01, seed=1)[1]) == 1


@pytest.mark.parametrize(("share", "count"), [(0.5, 1), (1.0, 9), (-0.1, 9), (0.9, 2)])
def test_a_split_that_leaves_nothing_to_learn_is_refused(share, count):
    with pytest.raises(VltrainError, match=r"data\.eval_share"):
        split_numbers(count, share=share, seed=1)


def test_lengths_are_known_before_a_picture_is_opened():
    records = records_of(record("<img>no.png</img>q", "ok"), record("q", "a"))

    samples = SampleDataset.of_records(records, LETTERS)

    assert samples.lengths.tolist() == [39, 34]


def test_a_sample_brings_its_pictures_pixels(tmp_path):
    Image.new("RGB", (4, 4), (10, 20, 30)).save(tmp_path / "a.png")
    Image.new("RGB", (9, 2), (40, 50, 60)).save(tmp_path / "b.png")
    value = record("<img>a.png</img><img>b.png</img>q", "a")
    samples = SampleDataset.of_records([Record(tmp_path / "train.json", 0, value)], LETTERS)

    sample = samples[0]

    assert sample["pixel_values"][:, :, 0, 0].tolist() == [[10, 20, 30], [40, 50, 60]]
    assert len(sample["input_ids"]) == len(sample["labels"]) == samples.lengths[0]
    assert sample["record"] == "train.json#0"


def test_a_pictures_bytes_may_stand_in_the_record(tmp_path):
    Image.new("RGB", (4, 4), (10, 20, 30)).save(tmp_path / "a.png")
    content = base64.b64encode((tmp_path / "a.png").read_bytes()).decode()
    part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{content}"}}
    value = {
        "messages": [
            {"role": "user", "content": [part, {"type": "text", "text": "q"}]},
            {"role": "assistant", "content": "a"},
        ]
    }

    sample = SampleDataset.of_records(records_of(value), LETTERS)[0]

    assert sample["pixel_values"][:, :, 0, 0].tolist() == [[10, 20, 30]]


def test_a_large_jpeg_is_decoded_at_the_scale_that_the_processor_needs(tmp_path):
    Image.new("RGB", (400, 240)).save(tmp_path / "a.jpg")
    seen = []

    class Watching(LetterProcessor):
        def image_processor(self, images, return_tensors):
            seen.extend(image.size for image in images)
            return super().image_processor(images, return_tensors)

    records = [Record(tmp_path / "t.json", 0, record("<img>a.jpg</img>q", "a"))]

    for side in (None, 40):
        SampleDataset.of_records(records, Watching(picture_side=side))[0]

    assert seen == [(400, 240), (200, 120)]


def test_boxes_in_pixels_are_measured_on_the_picture_beside_the_data_file(tmp_path):
    Image.new("RGB", (100, 50)).save(tmp_path / "a.png")
    value = {"query": "<image>q", "response": "<bbox>", "images": ["a.png"]}
    value["objects"] = {"bbox": [[10, 10, 20, 20]]}

    samples = SampleDataset.of_records([Record(tmp_path / "train.jsonl", 0, value)], LETTERS)

    answer = [token for token in samples[0]["labels"] if token != -100]
    assert "".join(map(chr, answer[:-1])) == "<box>(100,200),(200,400)</box>"


def test_records_are_read_in_the_format_that_is_set():
    value = {"messages": [{"role": "user", "content": "<img>a.png</img>q"}]}
    value["messages"].append({"role": "assistant", "content": "a"})

    with pytest.raises(VltrainError, match="<img> in its text"):
        SampleDataset.of_records(records_of(value), LETTERS)
    assert SampleDataset.of_records(
        records_of(value), LETTERS, format="qwen_vl"
    ).image_counts.tolist() == [1]


def test_a_sample_without_pictures_has_no_pixels():
    assert set(SampleDataset.of_records(records_of(record("q", "a")), LETTERS)[0]) == {
        *("input_ids", "labels", "record")
    }


def test_a_missing_picture_is_named_with_its_record():
    samples = SampleDataset.of_records(records_of(record("<img>no.png</img>q", "a")), LETTERS)

    with pytest.raises(VltrainError, match=r"^train\.json#0: picture 'no\.png' is missing"):
        samples[0]


def test_a_broken_picture_is_named_with_its_record(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    value = record("<img>a.png</img>q", "a")
    samples = SampleDataset.of_records([Record(tmp_path / "t.json", 4, value)], LETTERS)

    with pytest.raises(VltrainError, match=r"^t\.json#4: picture .*a\.png cannot be read"):
        samples[0]


def test_the_reason_stands_for_a_sample_whose_picture_is_bad_if_asked(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    values = (record("<img>a.png</img>q", "a"), record("q", "a"))
    records = [Record(tmp_path / "t.json", number, value) for number, value in enumerate(values)]

    samples = SampleDataset.of_records(records, LETTERS, bad_pictures="drop")

    assert set(samples[0]) == {"dropped"}
    assert samples[0]["dropped"].startswith(f"t.json#0: picture {tmp_path}/a.png cannot be read")
    assert "input_ids" in samples[1]


def test_all_faulty_records_are_in_one_error():
    values = [record("q", "a"), {}, record("q")]

    with pytest.raises(VltrainError) as caught:
        SampleDataset.of_records(records_of(*values), LETTERS)

    message = str(caught.value)
    assert "train.json#0" not in message
    assert "train.json#1: the record has no `conversations`" in message
    assert "train.json#2: no assistant turn says anything" in message


def test_samples_are_the_rows_of_a_table_that_are_asked_for():
    table = SampleDataset.of_records(
        records_of(*(record("q", "a" * n) for n in range(1, 5))), LETTERS
    ).table

    samples = SampleDataset(table, RecordReader(LETTERS), np.array([3, 1]))

    assert len(samples) == 2
    assert samples.lengths.tolist() == [37, 35]
    assert [samples.name(0), samples[1]["record"]] == ["train.json#3", "train.json#1"]


def test_learned_tokens_and_pictures_are_counted():
    samples = SampleDataset.of_records(records_of(record("<img>no.png</img>q", "abc")), LETTERS)

    assert samples.learned_tokens.tolist() == [4]
    assert samples.image_counts.tolist() == [1]


def test_a_dataset_survives_the_way_to_a_worker():
    samples = SampleDataset.of_records(records_of(record("q", "a")), LETTERS)

    assert pickle.loads(pickle.dumps(samples))[0] == samples[0]
