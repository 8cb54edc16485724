"""Samples into rows: each once, rows nearly full, the same for the same seed and epoch."""

import random

import pytest

from vltrain.data.packing import PackedDataset, pack


class Letters:
    """Samples that know their number and how long they are."""

    def __init__(self, *lengths: int) -> None:
        self.lengths = lengths

    def __getitem__(self, number: int) -> dict[str, int]:
        return {"number": number, "tokens": self.lengths[number]}


def mixed_lengths(count: int) -> list[int]:
    """Many short samples, few long ones, some with a picture's 258 tokens; 20 to 2048 tokens."""
    chance = random.Random(5)
    pictures = [258 * chance.choice((0, 0, 1, 1, 2, 4)) for _ in range(count)]
    texts = [20 + int(chance.lognormvariate(4.5, 1)) for _ in range(count)]
    return [min(2048, text + picture) for text, picture in zip(texts, pictures, strict=True)]


def token_counts(rows: list[tuple[int, ...]], lengths: list[int]) -> list[int]:
    return [sum(lengths[number] for number in row) for row in rows]


def test_a_sample_goes_where_it_leaves_the_least_space():
    # 5 opens a row and leaves 1, 4 opens one and leaves 2, 3 opens the last; 2 fits 4, 1 fits 5
    rows = pack([1, 2, 3, 4, 5], 6, seed=0, epoch=0)

    assert {frozenset(row) for row in rows} == {
        frozenset({4, 0}),
        frozenset({3, 1}),
        frozenset({2}),
    }


def test_every_sample_is_in_one_row_and_no_row_holds_too_much():
    lengths = mixed_lengths(500)

    rows = pack(lengths, 2048, seed=1, epoch=3)

    assert sorted(number for row in rows for number in row) == list(range(500))
    assert max(token_counts(rows, lengths)) <= 2048


@pytest.mark.parametrize("row_tokens", [2048, 4096])
def test_rows_of_mixed_lengths_are_98_percent_full_at_least(row_tokens):
    lengths = mixed_lengths(2000)

    rows = pack(lengths, row_tokens, seed=0, epoch=0)

    assert sum(lengths) / (len(rows) * row_tokens) >= 0.98


def test_the_rows_are_those_of_seed_and_epoch():
    lengths = mixed_lengths(200)
    rows = pack(lengths, 2048, seed=7, epoch=2)

    assert pack(lengths, 2048, seed=7, epoch=2) == rows
    assert pack(lengths, 2048, seed=7, epoch=3) != rows
    assert pack(lengths, 2048, seed=8, epoch=2) != rows


def test_samples_of_one_length_meet_others_in_each_epoch():
    first, second = (pack([3] * 40, 6, seed=0, epoch=epoch) for epoch in (0, 1))

    assert {frozenset(row) for row in first} != {frozenset(row) for row in second}


def test_every_epoch_has_the_same_number_of_rows():
    lengths = mixed_lengths(300)

    assert len({len(pack(lengths, 2048, seed=3, epoch=epoch)) for epoch in range(20)}) == 1


def test_a_sample_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="a sample of 7 tokens is longer than a row of 6"):
        pack([3, 7], 6, seed=0, epoch=0)


def test_no_samples_make_no_rows():
    assert pack([], 6, seed=0, epoch=0) == []


def test_a_row_of_a_dataset_is_its_samples_in_order():
    rows = PackedDataset(Letters(4, 2, 3), row_tokens=6)

    assert rows[(2, 0)] == [{"number": 2, "tokens": 3}, {"number": 0, "tokens": 4}]


def test_a_dataset_knows_how_many_rows_it_has_and_how_full_they_are():
    rows = PackedDataset(Letters(4, 2, 3), row_tokens=6)

    assert len(rows) == len(rows.rows(seed=1, epoch=5)) == 2
    assert rows.fill == 9 / 12
