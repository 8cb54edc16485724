"""Which of a dataset's splits is read."""

import pytest

from vltrain.data.faults import Fault
from vltrain.data.splits import chosen_split


@pytest.mark.parametrize(
    ("splits", "asked", "chosen"),
    [
        (["test", "train"], "test", "test"),
        (["test", "train"], None, "train"),
        (["test"], None, "test"),
    ],
)
def test_the_split_is_the_one_asked_for_or_train_or_the_only_one(splits, asked, chosen):
    assert chosen_split(splits, asked, "digits") == chosen


@pytest.mark.parametrize(
    ("splits", "asked", "message", "fix"),
    [
        (["dev", "test"], None, "the splits dev, test, none is named", "write digits:dev"),
        (["dev", "test"], "train", "no split train; it has dev, test", "write digits:dev"),
        ([], "train", "no splits, and train is asked for", "write digits"),
    ],
)
def test_a_split_that_cannot_be_chosen_is_a_fault_that_lists_them(splits, asked, message, fix):
    fault = chosen_split(splits, asked, "digits")

    assert isinstance(fault, Fault)
    assert message in fault.message
    assert fault.fix == fix
