"""Samples into rows: each once, rows nearly full, the same for the same seed and epoch."""

import random
from collections.abc import Iterable

import numpy as np
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


def token_counts(rows: Iterable[tuple[int, ...]], lengths: list[int]) -> list[int]:
    return [sum(lengths[number] for number in row) for row in rows]


def test_a_sample_goes_where_it_leaves_the_least_space():
    # 5 opens a row and leaves 1, 4 opens one and leaves 2, 3 opens the last; 2 fits 4, 1 fits 5
    rows = pack([1, 2, 3, 4, 5], 6, seed=0, epoch=0)

    assert {frozenset(row) for row in rows} == {
        frozenset({4, 0}),
        frozenset({3, 1}),
        frozenset({2}),
    }


def test_of_many_equal_samples_each_row_takes_all_it_can():
    # 4 + 4 leaves 2, 4 + 3 + 3 leaves none, 3 alone: as one sample after the other would go
    rows = pack([4, 3, 4, 3, 4, 3], 10, seed=0, epoch=0)

    assert sorted(token_counts(rows, [4, 3, 4, 3, 4, 3])) == [3, 8, 10]


def test_rows_are_those_of_one_sample_after_the_other():
    lengths = mixed_lengths(300)
    spaces: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [space for space in spaces if space >= length]
        if fitting:
            spaces.remove(min(fitting))
        spaces.append(min(fitting, default=2048) - length)

    rows = pack(lengths, 2048, seed=0, epoch=0)

    assert sorted(2048 - count for count in token_counts(rows, lengths)) == sorted(spaces)


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

    assert list(pack(lengths, 2048, seed=7, epoch=2)) == list(rows)
    assert list(pack(lengths, 2048, seed=7, epoch=3)) != list(rows)
    assert list(pack(lengths, 2048, seed=8, epoch=2)) != list(rows)


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
    assert list(pack([], 6, seed=0, epoch=0)) == []


def test_a_row_of_a_dataset_is_its_samples_in_order():
    rows = PackedDataset(Letters(4, 2, 3), row_tokens=6)

    assert rows[(2, 0)] == [{"number": 2, "tokens": 3}, {"number": 0, "tokens": 4}]


def test_a_dataset_knows_how_many_rows_it_has_and_how_full_they_are():
    rows = PackedDataset(Letters(4, 2, 3), row_tokens=6)

    assert len(rows) == len(rows.rows(seed=1, epoch=5)) == 2
    assert rows.fill == 9 / 12


def test_a_dataset_packs_the_samples_that_an_epoch_shows_as_often_as_it_shows_them():
    rows = PackedDataset(Letters(4, 2, 3), row_tokens=6, numbers=np.array([1, 2, 1, 1]))

    shown = sorted(number for row in rows.rows(seed=1, epoch=5) for number in row)
    assert shown == [1, 1, 1, 2]
    assert len(rows) == len(rows.rows(seed=1, epoch=5)) == 2
    assert rows.fill == 9 / 12


def test_a_row_behind_the_last_is_none():
    with pytest.raises(IndexError):
        pack([3, 3], 6, seed=0, epoch=0)[1]
