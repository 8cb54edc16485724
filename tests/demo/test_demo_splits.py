import hashlib
from collections import Counter

import pytest

from vltrain.demo.glyphs import scanned_digits
from vltrain.demo.questions import KINDS, kinds_of
from vltrain.demo.splits import Split, divide_scans, make_splits


@pytest.fixture(scope="module")
def splits() -> tuple[Split, Split]:
    return make_splits()


def picture_hashes(split: Split) -> set[str]:
    return {
        hashlib.sha256(picture.scene.image.tobytes()).hexdigest()
        for pictures in split.pictures.values()
        for picture in pictures
    }


def test_no_scan_is_on_both_sides():
    train, held_out = (
        {hashlib.sha256(scan.cells.tobytes()).hexdigest() for scan in side}
        for side in divide_scans(scanned_digits())
    )

    assert not train & held_out


def test_a_quarter_of_the_scans_of_each_digit_is_held_out():
    train, held_out = (
        Counter(scan.name for scan in side) for side in divide_scans(scanned_digits())
    )

    assert sum(train.values()) + sum(held_out.values()) == 1797
    for digit in "0123456789":
        share = held_out[digit] / (held_out[digit] + train[digit])
        assert 0.24 < share < 0.26


@pytest.mark.slow
def test_no_picture_is_on_both_sides(splits):
    train, held_out = (picture_hashes(split) for split in splits)

    assert not train & held_out


@pytest.mark.slow
def test_no_record_says_what_another_says(splits):
    said = [str(entry["conversations"]) for split in splits for entry in split.records]

    assert len(said) == len(set(said))


@pytest.mark.slow
def test_every_named_picture_exists(splits):
    for split in splits:
        files = {picture.file for pictures in split.pictures.values() for picture in pictures}
        text = str(split.records)
        named = {part.split("</img>")[0] for part in text.split("<img>")[1:]}
        assert named <= files


@pytest.mark.slow
def test_more_than_a_hundred_questions_of_each_kind_are_held_out(splits):
    _, held_out = splits
    asked = Counter(kind for entry in held_out.records for kind in kinds_of(entry["id"]))

    assert set(asked) == set(KINDS)
    assert min(asked.values()) >= 100


@pytest.mark.slow
def test_ids_are_unique_and_tell_the_kind_of_each_answer(splits):
    for split in splits:
        assert len({entry["id"] for entry in split.records}) == len(split.records)
        for entry in split.records:
            answers = [t["value"] for t in entry["conversations"] if t["from"] == "assistant"]
            kinds = kinds_of(entry["id"])
            assert len(kinds) == len(answers)
            assert ["<box>" in answer for answer in answers] == [k == "point" for k in kinds]


@pytest.mark.slow
def test_questions_come_in_both_languages_and_with_one_or_more_pictures_and_turns(splits):
    train, _ = splits
    texts = [str(entry["conversations"]) for entry in train.records]

    assert any("数字" in text for text in texts)
    assert any("digits" in text for text in texts)
    assert {text.count("<img>") for text in texts} == {1, 2}
    assert {len(entry["conversations"]) for entry in train.records} == {2, 4, 6}


@pytest.mark.slow
def test_splits_are_the_same_every_time(splits):
    again = make_splits()

    for before, after in zip(splits, again, strict=True):
        assert before.records == after.records
        assert picture_hashes(before) == picture_hashes(after)
