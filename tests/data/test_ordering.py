"""Random orders with neighbours of about the same length."""

import numpy as np

from vltrain.data.ordering import grouped_by_length


def test_the_longest_sample_comes_first_and_runs_go_from_long_to_short():
    # two samples a step, eight samples: runs of one step each
    order = np.array([4, 1, 7, 2, 0, 6, 3, 5])
    lengths = [50, 10, 30, 70, 20, 80, 60, 40]

    found = grouped_by_length(order, lengths, 2)

    # runs: [20, 10], [40, 30] -> by length; [50, 60], [70, 80]; then 80 changes with 20
    assert [lengths[number] for number in found] == [80, 10, 40, 30, 60, 50, 20, 70]


def test_steps_of_a_run_are_put_in_order_together():
    order = np.arange(16)
    lengths = [1, 9, 2, 8, 3, 7, 4, 6, 11, 19, 12, 18, 13, 17, 14, 16]

    found = grouped_by_length(order, lengths, 1)  # 4 steps to a run

    assert [lengths[n] for n in found[4:8]] == [7, 6, 4, 3]


def test_every_sample_is_there_once_however_few_there_are():
    for count in (1, 2, 3, 7, 100):
        found = grouped_by_length(np.arange(count)[::-1], np.arange(count), 4)
        assert sorted(found) == list(range(count))


def test_many_samples_are_put_in_order_by_fifty_steps():
    lengths = np.arange(1000) % 97

    found = grouped_by_length(np.arange(1000), lengths, 2)

    runs = lengths[found].reshape(10, 100)
    assert all((np.diff(run) <= 0).all() for run in runs[1:])
    assert (np.diff(lengths[found]) > 0).sum() >= 8
