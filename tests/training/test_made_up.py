"""Samples that are made up to be measured."""

from pathlib import Path

import numpy as np
from PIL import Image

from vltrain.training.made_up import MadeUpSamples, spread_lengths, write_photo

PICTURE = (900, 902, 902, 901)


def test_a_sample_has_its_length_its_picture_and_text_that_is_all_learned():
    samples = MadeUpSamples(PICTURE, spread_lengths(10, 10, 3), lambda: {"pixel_values": "pixels"})
    sample = samples[1]

    assert len(samples) == 3
    assert sample["input_ids"][:4] == list(PICTURE)
    assert len(sample["input_ids"]) == 10
    assert max(sample["input_ids"][4:]) < 900
    assert sample["labels"] == [-100] * 4 + sample["input_ids"][4:]
    assert sample["pixel_values"] == "pixels"
    assert samples.lengths.tolist() == [10, 10, 10]
    assert samples.learned_tokens.tolist() == [6, 6, 6]
    assert samples.image_counts.tolist() == [1, 1, 1]


def test_the_same_number_gives_the_same_sample_and_another_another():
    samples = MadeUpSamples(PICTURE, spread_lengths(40, 40, 2), dict)

    assert samples[0] == samples[0]
    assert samples[0] != samples[1]


def test_lengths_are_spread_from_the_least_to_the_greatest_as_their_logarithms_are():
    lengths = spread_lengths(10, 1000, 3000)

    assert lengths.min() == 10
    assert 950 < lengths.max() <= 1000
    assert abs(np.mean(lengths < 100) - 0.5) < 0.03
    assert np.array_equal(lengths, spread_lengths(10, 1000, 3000))


def test_a_photo_is_a_jpeg_of_12_megapixels(tmp_path: Path):
    write_photo(tmp_path / "photo.jpg")

    with Image.open(tmp_path / "photo.jpg") as photo:
        assert photo.format == "JPEG"
        assert photo.size == (4000, 3000)
    assert (tmp_path / "photo.jpg").stat().st_size > 500_000
