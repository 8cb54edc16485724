"""Data files in figures."""

import json
from pathlib import Path

import pytest
from letters import LetterProcessor, record
from PIL import Image

from vltrain.data.statistics import (
    Bin,
    Collected,
    Packing,
    Spread,
    collect,
    expected_packing,
    histogram,
    spread,
    summarise,
)


def written(folder: Path, *records: object) -> Path:
    file = folder / "train.json"
    file.write_text(json.dumps(records), encoding="utf-8")
    return file


def test_the_spread_of_numbers_is_by_nearest_rank():
    assert spread([5, 1, 3, 2]) == Spread(least=1, median=2, mean=2.75, p95=5, most=5)


def test_ninety_five_of_a_hundred_numbers_are_at_most_their_p95():
    found = spread(range(1, 101))

    assert found is not None
    assert (found.median, found.p95) == (50, 95)


def test_no_numbers_have_no_spread():
    assert spread([]) is None


def test_a_histogram_counts_every_length_once_in_bars_of_a_round_width():
    assert histogram([3, 4, 27, 29]) == (
        Bin(0, 4, 2),
        Bin(5, 9, 0),
        Bin(10, 14, 0),
        Bin(15, 19, 0),
        Bin(20, 24, 0),
        Bin(25, 29, 2),
    )


@pytest.mark.parametrize("longest", [1, 12, 999, 8192, 123_456])
def test_a_histogram_has_at_most_a_dozen_bars(longest: int):
    assert len(histogram([1, longest])) <= 12


def test_one_length_is_one_bar():
    assert histogram([7, 7, 7]) == (Bin(7, 7, 3),)


def test_samples_that_complete_each_other_fill_their_rows():
    assert expected_packing([6, 3, 4, 7], max_length=10) == Packing(10, 4, 2, 1.0)


def test_a_sample_goes_where_it_fits_best():
    # 9 leaves 1, 5 leaves 5, and 5 more fill that row; 1 fills the first.
    assert expected_packing([1, 5, 5, 9], max_length=10) == Packing(10, 4, 2, 1.0)


def test_samples_longer_than_a_row_are_left_out():
    assert expected_packing([11, 5], max_length=10) == Packing(10, 1, 1, 0.5)


def test_nothing_to_pack_fills_no_row():
    assert expected_packing([11], max_length=10) == Packing(10, 0, 0, 0.0)


def test_pictures_are_counted_for_each_sample_and_measured_once_for_each_file(tmp_path: Path):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("no picture")
    file = written(
        tmp_path,
        record("<img>a.png</img>q", "x"),
        record("<img>a.png</img><img>b.png</img><img>c.png</img>q", "x"),
        record("q", "x"),
    )

    pictures = summarise(collect([file], LetterProcessor()), 100).pictures

    assert (pictures.total, pictures.files, pictures.unreadable) == (4, 1, 2)
    assert pictures.per_sample == {0: 1, 1: 1, 3: 1}
    assert pictures.width == Spread(40, 40, 40.0, 40, 40)
    assert pictures.height == Spread(30, 30, 30.0, 30, 30)


def test_records_that_cannot_be_laid_out_are_counted_and_left_out(tmp_path: Path):
    file = written(tmp_path, record("q", "x"), {"conversations": []}, [], record("q", "x"))

    summary = summarise(collect([file], LetterProcessor()), 100)

    assert (summary.records, summary.refused) == (4, 2)
    assert sum(found.samples for found in summary.histogram) == 2


def test_lines_that_are_no_json_count_as_records(tmp_path: Path):
    file = tmp_path / "train.jsonl"
    file.write_text(json.dumps(record("q", "x")) + "\n{\n")

    collected = collect([file], LetterProcessor())

    assert (collected.records, collected.refused) == (2, 1)


def test_boxes_and_scripts_are_counted(tmp_path: Path):
    box = "<box>(1,2),(3,4)</box>"
    file = written(tmp_path, record("在哪里", box + box), record("Where?", "Nowhere"))

    summary = summarise(collect([file], LetterProcessor()), 100)

    assert (summary.boxes, summary.samples_with_boxes) == (2, 1)
    assert summary.scripts == {"Chinese": 1, "Latin": 1}


def test_samples_over_each_limit_are_counted():
    collected = Collected(records=3, lengths=[100, 600, 3000], image_counts=[0, 0, 0])

    assert summarise(collected, 600).over_limit == {
        512: 2,
        600: 1,
        1024: 1,
        2048: 1,
        4096: 0,
        8192: 0,
    }


def test_boxes_in_pixels_are_counted_by_the_size_of_their_picture(tmp_path: Path):
    Image.new("RGB", (200, 100)).save(tmp_path / "a.png")
    swift = {
        "query": "<image>Where?",
        "response": "<bbox>",
        "images": ["a.png"],
        "objects": {"bbox": [[20, 10, 100, 50]], "bbox_type": "real"},
    }

    collected = collect([written(tmp_path, swift)], LetterProcessor())

    assert (collected.refused, collected.box_counts) == (0, [1])


def test_records_are_counted_in_the_format_that_is_set(tmp_path: Path):
    said = [{"role": "user", "content": "<img>a.png</img>q"}, {"role": "gpt", "content": "a"}]
    file = written(tmp_path, {"messages": said})

    assert collect([file], LetterProcessor()).refused == 1
    assert collect([file], LetterProcessor(), format="qwen_vl").image_counts == [1]
