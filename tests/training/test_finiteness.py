"""Steps without a finite loss: how they are told, and whom they name."""

import pytest
import torch

from vltrain.training.finiteness import NamedBatches, StepWatch, listed, not_finite_error

FINE, NAN, INFINITE = torch.tensor(1.5), torch.tensor(float("nan")), torch.tensor(float("inf"))


def watch_of(*batches: tuple[list[str], torch.Tensor]) -> StepWatch:
    watch = StepWatch(stop_after=2)
    for records, loss in batches:
        watch.saw(records, loss)
    return watch


def test_batches_of_samples_and_of_rows_tell_their_records():
    samples = [{"record": "a.json#0"}, {"record": "a.json#1"}]
    rows = [[{"record": "a.json#2"}], [{"record": "a.json#3"}, {"record": "a.json#4"}]]
    collate = NamedBatches(lambda given: {"count": len(given)})

    assert collate(samples) == {"count": 2, "records": ["a.json#0", "a.json#1"]}
    assert collate(rows) == {"count": 2, "records": ["a.json#2", "a.json#3", "a.json#4"]}


@pytest.mark.parametrize("loss", [NAN, INFINITE, -INFINITE])
def test_the_records_of_the_batch_whose_loss_is_not_finite_are_named(loss):
    watch = watch_of((["a", "b"], FINE), (["c"], loss), (["d"], FINE))

    assert watch.is_bad(norm=1.0)
    assert watch.suspects() == ["c"]


@pytest.mark.parametrize("norm", [float("nan"), INFINITE])
def test_where_only_the_gradient_is_not_finite_all_records_of_the_step_are_named(norm):
    watch = watch_of((["a", "b"], FINE), (["c"], FINE))

    assert watch.is_bad(norm)
    assert watch.suspects() == ["a", "b", "c"]


def test_a_step_of_finite_losses_and_gradients_is_not_bad():
    assert not watch_of((["a"], FINE)).is_bad(norm=torch.tensor(3.0))


def test_the_norm_of_a_gradient_that_is_scaled_does_not_count():
    assert not watch_of((["a"], FINE)).is_bad(norm=None)


def test_bad_steps_are_counted_in_a_row():
    watch = StepWatch(stop_after=2)
    counted = []
    for bad in (True, False, True, True):
        watch.step_done(bad=bad)
        counted.append(watch.in_a_row)

    assert counted == [1, 0, 1, 2]


def test_a_step_begins_without_the_batches_of_the_one_before():
    watch = watch_of((["a"], NAN))
    watch.step_done(bad=True)
    watch.saw(["b"], FINE)

    assert not watch.is_bad(norm=1.0)


def test_the_error_names_step_times_and_records_and_has_its_exit_code():
    error = not_finite_error(12, 3, ["a.json#4 (id x)", "a.json#7"])

    assert str(error).startswith(
        "step 12: the loss or its gradient is NaN or infinite, 3 steps in a row; it "
        "came of a.json#4 (id x), a.json#7\n  fix: "
    )
    assert error.exit_code == 4


def test_many_records_are_counted_not_listed():
    assert listed(str(number) for number in range(10)) == "0, 1, 2, 3, 4, 5, 6, 7 and 2 more"
