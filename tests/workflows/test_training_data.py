"""What a run learns from and is measured on: packed, mixed, streamed, held out."""

import pytest
from runs import PACKED, metrics, quick, run, same, weights, write_texts


def test_packed_rows_are_learned_from_and_nothing_of_them_is_padding(base, data, tmp_path):
    settings = ("trainer.max_steps=12", "lora.embeddings=true")

    shown = run(quick(base, data, tmp_path / "run", *PACKED, *settings))

    assert "packed into 2 rows of up to 270 tokens, 89.3% full" in shown  # 482 of 540
    assert "12 steps of 1 rows" in shown
    losses = [loss for _, loss in metrics(tmp_path / "run")]
    assert losses[-1] < losses[0] - 1
    assert {share for _, share in metrics(tmp_path / "run", "padding_share")} == {0.0}
    learned = [count for _, count in metrics(tmp_path / "run", "learned_tokens")]
    assert [sum(learned[at : at + 2]) for at in range(0, 12, 2)] == [108] * 6  # each epoch, all


def test_a_packed_run_measures_the_eval_loss_of_one_that_is_not(base, data, tmp_path):
    held_out = write_texts(tmp_path / "held_out.json", "a", "b" * 40)
    settings = (f"data.eval_files={held_out}", "trainer.learning_rate=0.0", "trainer.max_steps=2")

    run(quick(base, data, tmp_path / "packed", *settings, *PACKED))
    run(quick(base, data, tmp_path / "padded", *settings))

    packed, padded = (metrics(tmp_path / name, "eval_loss") for name in ("packed", "padded"))
    assert packed[-1][1] == pytest.approx(padded[-1][1], rel=1e-5)


def test_a_mix_shows_files_as_often_as_it_says_and_the_run_says_what_an_epoch_is(
    base, data, tmp_path
):
    other = write_texts(tmp_path / "other.json", "a", "b", "c", "d")
    files = f"data.files=[{data}, {other}]"
    mix = f"data.mix=[{{file: {data}, weight: 0.5}}, {{file: {other}, samples: 6}}]"

    shown = run(quick(base, data, tmp_path / "run", files, mix, "trainer.max_steps=8"))

    assert "an epoch: 2 of 4 of train.json, 1 x 4 + 2 of 4 of other.json: 8 samples" in shown
    # two epochs of 2 + 6 samples, 2 a step: all of train.json once, each other sample thrice
    learned = [count for _, count in metrics(tmp_path / "run", "learned_tokens")]
    assert sum(learned) == 108 + 4 * 3 * 2


@pytest.mark.slow
def test_records_are_streamed_pass_after_pass(base, data, tmp_path):
    held_out = write_texts(tmp_path / "held_out.json", "a", "b")
    stream = ("data.streaming=true", "data.shuffle_buffer=3", f"data.eval_files={held_out}")
    workers = ("trainer.dataloader_num_workers=2", "trainer.save_steps=3")

    shown = run(quick(base, data, tmp_path / "run", *stream, *workers))
    run(quick(base, data, tmp_path / "alone", *stream, "trainer.save_steps=3"))

    assert "streamed from train.json, 3 records held to draw from" in shown
    assert "6 steps of 2 samples" in shown
    learned = [count for _, count in metrics(tmp_path / "run", "learned_tokens")]
    assert [sum(learned[at : at + 2]) for at in range(0, 6, 2)] == [108] * 3  # each pass, all
    assert metrics(tmp_path / "run") == metrics(tmp_path / "alone")
    assert [step for step, _ in metrics(tmp_path / "run", "eval_loss")] == [3, 6]


def test_samples_that_are_too_long_are_dropped_and_counted_where_the_recipe_says_so(
    base, data, tmp_path
):
    drop = ("data.max_length=130", "data.too_long=drop", "trainer.max_steps=1")

    shown = run(quick(base, data, tmp_path / "run", *drop))

    assert "3 samples, " in shown
    assert "longest 130 tokens, 1 dropped" in shown


def test_files_to_evaluate_on_are_measured_after_each_epoch(base, data, tmp_path):
    held_out = write_texts(tmp_path / "held_out.json", "a", "b")

    shown = run(quick(base, data, tmp_path / "run", f"data.eval_files={held_out}"))

    # 4 samples, 2 a step: an epoch has 2 steps
    assert [step for step, _ in metrics(tmp_path / "run", "eval_loss")] == [2, 4, 6]
    assert "2 samples to evaluate on" in shown
    assert "step 6: eval loss" in shown


def test_a_share_to_evaluate_on_is_not_learned_from(base, data, tmp_path):
    shown = run(quick(base, data, tmp_path / "run", "data.eval_share=0.25"))

    assert "3 samples, " in shown
    assert "1 samples to evaluate on" in shown
    assert len(metrics(tmp_path / "run", "eval_loss")) >= 3


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_best_checkpoint_is_kept_where_it_is_asked_for(base, tmp_path, method):
    learned = write_texts(tmp_path / "learned.json", "aaaa", "aaaa aaaa")
    other = write_texts(tmp_path / "other.json", "bbbb bbbb")
    settings = (f"data.eval_files={other}", "trainer.save_steps=1", "trainer.warmup_steps=0")
    best = ("trainer.load_best_model_at_end=true", "trainer.max_steps=12")

    run(quick(base, learned, tmp_path / "run", *settings, *best, method=method))

    measured = metrics(tmp_path / "run", "eval_loss")
    assert [step for step, _ in measured] == list(range(1, 13))
    lowest = min(measured, key=lambda point: point[1])[0]
    assert lowest < 12  # to learn "a" by heart makes "b" unlikely
    final = weights(tmp_path / "run" / "final")
    assert same(final, weights(tmp_path / "run" / f"checkpoint-{lowest}"))
    assert not same(final, weights(tmp_path / "run" / "checkpoint-12"))
