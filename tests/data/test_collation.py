"""Samples of all kinds in one batch."""

import torch

from vltrain.data.collation import Collator, collate_rows

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
    assert "pixel_values" not in Collator(PAD)([sample(1)])


def test_a_pad_token_that_somebody_wrote_stays_visible():
    batch = Collator(PAD)([sample(5, PAD, 6)])

    assert batch["attention_mask"].tolist() == [[1, 1, 1]]


def test_the_samples_of_a_row_lie_one_after_the_other_without_padding():
    batch = collate_rows([[sample(5, 6, 7), sample(8, 9)]])

    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == [0, 3, 5]
    assert batch["cu_seq_lens_q"].dtype == torch.int32
    assert (batch["max_length_q"], batch["max_length_k"]) == (3, 3)
    assert "attention_mask" not in batch


def test_nothing_predicts_the_first_token_of_a_sample_from_the_sample_before():
    learned_whole = {"input_ids": [3, 4], "labels": [3, 4], "record": "train.json#0"}

    batch = collate_rows([[learned_whole, learned_whole]])

    assert batch["labels"].tolist() == [[-100, 4, -100, 4]]


def test_a_batch_names_the_places_before_learned_tokens():
    quiet = {"input_ids": [3, 4, 5], "labels": [-100, -100, 5], "record": "train.json#0"}

    assert Collator(PAD)([sample(1, 2), quiet])["learned_places"].tolist() == [0, 4]
    assert collate_rows([[sample(1, 2), quiet]])["learned_places"].tolist() == [0, 3]


def test_several_rows_are_one_long_row_with_their_pictures_in_order():
    rows = [[sample(1, pictures=1), sample(2)], [sample(3, 4, pictures=2)]]

    batch = collate_rows(rows)

    assert batch["input_ids"].tolist() == [[1, 2, 3, 4]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 1, 2, 4]
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [1, 3, 3]


def test_what_stands_for_a_dropped_sample_is_told_beside_the_others():
    gone = {"dropped": "train.json#4: picture a.png is missing"}

    padded = Collator(PAD)([sample(5, 6), gone])
    packed = collate_rows([[gone, sample(5, 6)], [sample(7)]])

    assert padded.pop("dropped") == packed.pop("dropped") == [gone["dropped"]]
    assert padded["input_ids"].tolist() == [[5, 6]]
    assert packed["input_ids"].tolist() == [[5, 6, 7]]


def test_a_batch_whose_samples_are_all_dropped_holds_a_token_that_nobody_learns():
    gone = {"dropped": "why"}

    for batch in (Collator(PAD)([gone, gone]), collate_rows([[gone], [gone]])):
        assert batch["dropped"] == ["why", "why"]
        assert batch["input_ids"].tolist() == [[0]]
        assert batch["labels"].tolist() == [[-100]]
        assert "pixel_values" not in batch
