"""Steps of packed samples: which samples a step has, and how they lie in rows."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vltrain.data.step_rows import StepRows, split_step, spread


class Numbers:
    """Samples that are their own numbers."""

    def __init__(self, *lengths: int) -> None:
        self.lengths = np.array(lengths)

    def __getitem__(self, number: int) -> dict[str, int]:
        return {"number": number}


def test_the_longest_go_first_each_to_where_least_is():
    assert spread([1, 5, 2, 4], 2) == [[0, 1], [2, 3]]
    assert spread([3], 2) == [[0], []]


def test_samples_that_fit_the_budget_together_are_one_row_in_their_order():
    assert split_step([4, 2, 3], 9, 1) == [[[0, 1, 2]]]


def test_samples_over_the_budget_are_as_few_rows_as_hold_them():
    assert split_step([4, 4, 4, 4], 8, 1) == [[[0, 2], [1, 3]]]


def test_processes_have_as_many_rows_as_each_other():
    first, second = split_step([8, 2, 2, 2], 8, 2)

    assert (first, second) == ([[0]], [[1, 2, 3]])
    assert split_step([8, 8, 8], 8, 2) == [[[0], [2]], [[1], []]]


def test_a_sample_longer_than_a_row_is_an_error():
    with pytest.raises(ValueError, match="9 tokens is longer than a row of 8"):
        split_step([3, 9], 8, 1)


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=24),
    row_tokens=st.integers(20, 60),
    processes=st.integers(1, 4),
)
def test_every_sample_is_in_one_row_and_no_row_exceeds_the_budget(lengths, row_tokens, processes):
    shares = split_step(lengths, row_tokens, processes)

    assert len(shares) == processes
    assert len({len(rows) for rows in shares}) == 1
    held = [place for rows in shares for row in rows for place in row]
    assert sorted(held) == list(range(len(lengths)))
    assert all(sum(lengths[p] for p in row) <= row_tokens for rows in shares for row in rows)


def test_a_step_has_the_next_samples_of_the_order_and_the_last_what_is_left():
    rows = StepRows(Numbers(2, 2, 2, 2, 2), step_samples=2, row_tokens=8)

    assert list(rows.shares([4, 0, 3, 1, 2])) == [((4, 0),), ((3, 1),), ((2,),)]
    assert (rows.steps, len(rows)) == (3, 3)


def test_the_shares_of_a_step_come_after_each_other_process_by_process():
    rows = StepRows(Numbers(4, 4, 3), step_samples=2, row_tokens=4, processes=2)

    assert list(rows.shares([2, 1, 0])) == [((1,),), ((2,),), ((0,),), ((),)]
    assert len(rows) == 4


def test_a_share_opens_its_samples_row_by_row():
    rows = StepRows(Numbers(1, 1, 1), step_samples=3, row_tokens=2)

    assert rows[((2, 0), (1,))] == [[{"number": 2}, {"number": 0}], [{"number": 1}]]
