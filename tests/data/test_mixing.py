"""What an epoch shows of each file: counts, draws without repetition, words for the plan."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from vltrain.config import DataConfig, MixEntry
from vltrain.data.mixing import Mix, Portion, mix_of
from vltrain.errors import VltrainError

A, B = Path("a.json"), Path("b.json")


def shown(mix: Mix, epoch: int, seed: int = 3) -> list[int]:
    return mix.numbers(seed=seed, epoch=epoch).tolist()


def mixed(*entries: MixEntry, a: int = 6, b: int = 4) -> Mix:
    """A mix of two files with so many samples each; those of `b` come after those of `a`."""
    mix = mix_of(DataConfig(files=(A, B), mix=entries), np.array([0] * a + [1] * b))
    assert mix is not None
    return mix


def test_without_a_mix_every_sample_is_shown_once():
    assert mix_of(DataConfig(files=(A,)), np.array([0, 0])) is None


def test_a_weight_of_two_shows_each_sample_twice_and_other_files_once():
    mix = mixed(MixEntry(A, weight=2.0))

    assert Counter(shown(mix, 0)) == dict.fromkeys(range(6), 2) | dict.fromkeys(range(6, 10), 1)
    assert len(mix) == 16


def test_a_quarter_of_a_file_is_another_quarter_until_all_have_been_shown():
    mix = mixed(MixEntry(A, weight=0), MixEntry(B, weight=0.25))

    epochs = [shown(mix, epoch) for epoch in range(8)]

    assert {len(epoch) for epoch in epochs} == {1}
    assert {number for epoch in epochs[:4] for number in epoch} == {6, 7, 8, 9}
    assert {number for epoch in epochs[4:] for number in epoch} == {6, 7, 8, 9}


def test_a_draw_goes_on_over_the_end_of_a_pack_without_favourites():
    mix = mixed(MixEntry(A, samples=4), MixEntry(B, samples=0))  # 4 of 6: three epochs, two packs

    counts = Counter(number for epoch in range(3) for number in shown(mix, epoch))

    assert counts == dict.fromkeys(range(6), 2)


def test_more_samples_than_there_are_come_as_whole_passes_and_a_draw():
    mix = mixed(MixEntry(B, samples=10))

    counts = Counter(number for number in shown(mix, 0) if number >= 6)

    assert sorted(counts.values()) == [2, 2, 3, 3]


def test_what_is_shown_is_a_function_of_seed_and_epoch():
    mix = mixed(MixEntry(A, weight=0.5))

    assert shown(mix, 1) == shown(mix, 1)
    assert shown(mix, 1) != shown(mix, 2)
    assert shown(mix, 1) != shown(mix, 1, seed=4)


def test_shares_are_rounded_to_the_nearest_number_of_samples():
    assert [MixEntry(A, weight=0.25).shown(count) for count in (1, 2, 5, 6)] == [0, 1, 1, 2]


def test_a_mix_says_what_an_epoch_is():
    mix = Mix(
        (
            Portion(A, np.arange(1000), 2000),
            Portion(B, np.arange(1000), 250),
            Portion(Path("c.json"), np.arange(10), 13),
            Portion(Path("d.json"), np.arange(10), 0),
        )
    )

    assert str(mix) == (
        "2 x 1,000 of a.json, 250 of 1,000 of b.json, 1 x 10 + 3 of 10 of c.json, "
        "0 of 10 of d.json: 2,263 samples"
    )


def test_samples_of_a_file_that_has_none_left_cannot_be_shown():
    with pytest.raises(VltrainError, match=r"data\.mix: .* 5 samples of b\.json, and no sample"):
        mixed(MixEntry(B, samples=5), b=0)


def test_shares_too_small_for_a_single_sample_are_refused():
    with pytest.raises(VltrainError, match=r"shows no sample: 0 of 6 of a\.json"):
        mixed(MixEntry(A, weight=0.01), MixEntry(B, weight=0))
