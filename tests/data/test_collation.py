"""Samples of all kinds in one batch."""

import torch

from vltrain.data.collation import Collator

PAD = 0


def sample(*ids, pictures=0):
    item = {"input_ids": list(ids), "labels": [-100, *ids[1:]], "record": "train.json#0"}
    if pictures:
        item["pixel_values"] = torch.full((pictures, 3, 2, 2), float(ids[0]))
    return item


def test_samples_are_padded_on_the_right_to_the_longest_of_the_batch():
    batch = Collator(PAD)([sample(5, 6, 7), sample(8)])

    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, PAD, PAD]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [-100, -100, -100]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_pictures_of_all_samples_are_stacked_in_order():
    batch = Collator(PAD)([sample(1, pictures=1), sample(2), sample(3, pictures=2)])

    assert batch["pixel_values"].shape == (3, 3, 2, 2)
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [1, 3, 3]


def test_a_batch_without_pictures_has_no_pixels():
    assert set(Collator(PAD)([sample(1)])) == {"input_ids", "attention_mask", "labels"}


def test_a_pad_token_that_somebody_wrote_stays_visible():
    batch = Collator(PAD)([sample(5, PAD, 6)])

    assert batch["attention_mask"].tolist() == [[1, 1, 1]]
