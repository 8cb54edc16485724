"""A recipe to its end: what is refused before, what is written, how a run goes on."""

import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from runs import metrics, quick, refused, run, weights
from safetensors.torch import save_file
from tiny import write_conversations, write_qwen_vl
from torch import Tensor

from vltrain.config import load_recipe, recipe_to_yaml
from vltrain.errors import VltrainError
from vltrain.models import load_model, load_processor
from vltrain.models.fingerprint import weights_hash
from vltrain.training.arguments import training_arguments
from vltrain.training.run_dir import RunDir
from vltrain.workflows.merge import merge

GOLDEN = Path(__file__).parents[1] / "golden"

PACKED = (
    "data.packing=true",
    "data.max_length=270",  # two of the four samples to a row, so an epoch has two rows
    "trainer.gradient_accumulation_steps=1",
)
BY_LENGTH = "trainer.train_sampling_strategy=group_by_length"
STREAMED = ("data.streaming=true", "data.shuffle_buffer=3")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen_vl(tmp_path_factory.mktemp("train") / "base")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_conversations(tmp_path_factory.mktemp("data"))


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def write_texts(file: Path, *answers: str) -> Path:
    records = [
        {"conversations": [{"from": "user", "value": "?"}, {"from": "assistant", "value": answer}]}
        for answer in answers
    ]
    file.write_text(json.dumps(records))
    return file


@pytest.mark.slow
def test_four_samples_learned_by_heart_are_said_word_for_word_by_the_merged_model(
    base, data, tmp_path
):
    settings = ("lora.embeddings=true", "lora.dropout=0", "trainer.max_steps=100")
    batch = ("trainer.per_device_train_batch_size=4", "trainer.gradient_accumulation_steps=1")

    run(quick(base, data, tmp_path / "run", *settings, *batch, "lora.r=16"))
    assert metrics(tmp_path / "run")[-1][1] < 0.01
    merge(tmp_path / "run" / "final", tmp_path / "merged")
    shutil.rmtree(tmp_path / "run")

    answers = tmp_path / "answers.jsonl"
    command = [sys.executable, "-m", "vltrain", "chat", str(tmp_path / "merged")]
    command += ["--input", str(data), "--output", str(answers), "--max-new-tokens", "64"]
    subprocess.run(command, check=True, timeout=120, stderr=subprocess.DEVNULL)
    rows = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
    assert [(row["record"], row["turn"], row["answer"]) for row in rows] == [
        (0, 1, "<ref>red</ref><box>(142,142),(500,500)</box>"),
        (1, 1, "<ref>green</ref><box>(535,71),(892,428)</box>"),
        (2, 1, "蓝<box>(71,607),(428,964)</box>"),
        (3, 1, "Hello!"),
        (3, 3, "<box>(500,500),(857,857)</box>"),
    ]


# --- what a run leaves behind ---


def test_a_lora_run_leaves_all_that_belongs_to_it(base, data, tmp_path):
    recipe = quick(
        base, data, tmp_path / "run", "trainer.save_steps=3", "trainer.report_to=tensorboard"
    )

    shown = run(recipe)

    out = tmp_path / "run"
    assert load_recipe(out / "recipe.yaml", method="lora") == recipe
    assert [step for step, _ in metrics(out)] == [1, 2, 3, 4, 5, 6]
    assert {p.name for p in out.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-6"}
    assert (out / "loss.png").stat().st_size > 1000
    assert list(out.rglob("events.out.tfevents*"))
    environment = json.loads((out / "environment.json").read_text())
    assert environment["base"]["hash"] == weights_hash(base)
    assert (environment["dtype"], environment["engine"]) == ("fp32", "none")
    assert same(weights(out / "final"), weights(out / "checkpoint-6"))
    assert (out / "final" / "qwen.tiktoken").is_file()
    for words in ("4 samples, 482 tokens (108 learned), 5 pictures", "6 steps of 2 samples"):
        assert words in shown


def test_a_full_run_leaves_a_model_with_the_published_names_in_the_bases_dtype(data, tmp_path):
    base = write_qwen_vl(tmp_path / "base")
    halves = {name: tensor.bfloat16() for name, tensor in weights(base).items()}
    save_file(halves, base / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text()) | {"torch_dtype": "bfloat16"}
    (base / "config.json").write_text(json.dumps(config))

    run(quick(base, data, tmp_path / "run", method="full"))

    before, after = weights(base), weights(tmp_path / "run" / "final")
    assert before.keys() == after.keys()
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    kept = {name for name in before if torch.equal(before[name], after[name])}
    visual = {name for name in before if name.startswith("transformer.visual.")}
    assert {name for name in visual if ".attn_pool." not in name} == kept
    assert same(load_model(tmp_path / "run" / "final").state_dict(), after)
    assert load_processor(tmp_path / "run" / "final").pad_id == 256
    assert json.loads((tmp_path / "run" / "final" / "config.json").read_text()) == config


def test_the_same_command_on_a_finished_run_says_so_and_leaves_it(base, data, tmp_path):
    recipe = quick(base, data, tmp_path / "run", "trainer.max_steps=1")
    run(recipe)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}

    shown = run(recipe)

    assert shown == f"{tmp_path}/run is finished: its weights are in {tmp_path}/run/final\n"
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")} == before


def test_another_recipe_into_the_directory_of_a_run_is_refused_by_its_keys(base, data, tmp_path):
    run(quick(base, data, tmp_path / "run", "trainer.max_steps=1"))

    message = refused(quick(base, data, tmp_path / "run", "trainer.max_steps=2", "lora.r=8"))

    assert "trainer.max_steps (1 there, 2 here)" in message
    assert "lora.r (4 there, 8 here)" in message


def test_weights_in_bfloat16_are_trained_by_adapters_in_float32(base, data, tmp_path):
    run(quick(base, data, tmp_path / "run", "dtype=bf16", "lora.embeddings=true"))

    learned = weights(tmp_path / "run" / "final")
    assert {tensor.dtype for tensor in learned.values()} == {torch.float32}
    losses = [loss for _, loss in metrics(tmp_path / "run")]
    assert losses[-1] < losses[0] - 1
    assert all(math.isfinite(loss) for loss in losses)
    merge(tmp_path / "run" / "final", tmp_path / "merged", console=Console(file=io.StringIO()))


def test_frozen_weights_of_a_float32_base_survive_a_run_in_bfloat16(base, data, tmp_path):
    steps = ("trainer.max_steps=1", "trainer.warmup_steps=0", "dtype=bf16")
    run(quick(base, data, tmp_path / "run", *steps, method="full"))

    before, after = weights(base), weights(tmp_path / "run" / "final")
    frozen = {name for name in before if name.startswith("transformer.visual.transformer.")}
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    assert not torch.equal(before["lm_head.weight"], after["lm_head.weight"])


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


def test_the_first_records_of_a_stream_are_checked_before_weights_are_read(
    unreadable_base, tmp_path
):
    file = write_texts(tmp_path / "train.json", "a", "")

    told = refused(quick(unreadable_base, file, tmp_path / "run", "data.streaming=true"))

    assert "train.json#1" in told
    assert "nothing was trained" in told


# --- a run that was cut off ---


class CutOff(BaseException):
    """What ends a run in the middle of it."""


@pytest.mark.parametrize(
    ("method", "settings", "checkpoint"),
    [
        ("lora", ("trainer.save_steps=2",), 4),
        pytest.param("full", ("trainer.save_steps=2", BY_LENGTH), 4, marks=pytest.mark.slow),
        # in the middle of an epoch
        pytest.param("lora", ("trainer.save_steps=3", *PACKED), 3, marks=pytest.mark.slow),
        # 3 steps an epoch: in the second
        pytest.param("lora", ("trainer.save_steps=2", "MIX"), 4, marks=pytest.mark.slow),
        pytest.param("lora", ("trainer.save_steps=2", "MIX", *PACKED), 4, marks=pytest.mark.slow),
        pytest.param("lora", ("trainer.save_steps=2", *STREAMED), 4, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_was_cut_off_goes_on_as_if_it_had_not_been(
    base, data, tmp_path, monkeypatch, method, settings, checkpoint
):
    settings = [f"data.mix=[{{file: {data}, weight: 1.5}}]" if s == "MIX" else s for s in settings]
    run(quick(base, data, tmp_path / "whole", *settings, method=method))
    write = RunDir.append_metrics

    def write_and_stop(self: RunDir, row: dict[str, Any]) -> None:
        write(self, row)
        if row["step"] == 5:
            raise CutOff

    recipe = quick(base, data, tmp_path / "cut", *settings, method=method)
    monkeypatch.setattr(RunDir, "append_metrics", write_and_stop)
    with pytest.raises(CutOff):
        run(recipe)
    monkeypatch.undo()
    assert not (tmp_path / "cut" / "final").exists()

    shown = run(recipe)

    assert f"resuming from {tmp_path}/cut/checkpoint-{checkpoint}" in shown
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    assert metrics(tmp_path / "cut", "learned_tokens") == metrics(
        tmp_path / "whole", "learned_tokens"
    )
    assert same(weights(tmp_path / "cut" / "final"), weights(tmp_path / "whole" / "final"))


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(base, data, tmp_path):
    settings = ("trainer.max_steps=24", "trainer.save_steps=4")
    run(quick(base, data, tmp_path / "whole", *settings))
    recipe = quick(base, data, tmp_path / "cut", *settings)
    (tmp_path / "recipe.yaml").write_text(recipe_to_yaml(recipe), encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, "-m", "vltrain", "lora", str(tmp_path / "recipe.yaml")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while process.poll() is None and len(metrics(tmp_path / "cut")) < 9:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "cut" / "final").exists()

    shown = run(recipe)

    assert "resuming from" in shown
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")


# --- evaluation ---


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


# --- what is refused before the model is loaded ---


@pytest.fixture
def unreadable_base(tmp_path: Path) -> Path:
    """A base whose weights raise an error as soon as they are read."""
    folder = write_qwen_vl(tmp_path / "unreadable")
    (folder / "model.safetensors").write_bytes(b"no weights")
    return folder


def test_all_faults_of_the_data_are_told_before_weights_are_read(unreadable_base, tmp_path):
    picture = {"from": "user", "value": "Picture 1: <img>gone.png</img>\nWhat?"}
    records = [
        {"id": "a", "conversations": [picture, {"from": "assistant", "value": "A cat."}]},
        {"id": "b", "conversations": []},
        {"id": "c", "conversations": [{"from": "nobody", "value": "Hi"}]},
    ]
    (tmp_path / "bad.json").write_text(json.dumps(records))

    told = refused(quick(unreadable_base, tmp_path / "bad.json", tmp_path / "run"))

    for words in ("gone.png", "bad.json#0 (id a)", "bad.json#1 (id b)", "bad.json#2 (id c)"):
        assert words in told
    assert "nothing was trained" in told
    assert not (tmp_path / "run").exists()


def test_a_recipe_that_was_mended_finds_its_directory_free(base, data, tmp_path):
    refused(quick(base, data, tmp_path / "run", "data.max_length=10"))

    run(quick(base, data, tmp_path / "run", "trainer.max_steps=1"))

    assert (tmp_path / "run" / "final").is_dir()


def test_samples_that_are_too_long_are_dropped_and_counted_where_the_recipe_says_so(
    base, data, tmp_path
):
    drop = ("data.max_length=130", "data.too_long=drop", "trainer.max_steps=1")

    shown = run(quick(base, data, tmp_path / "run", *drop))

    assert "3 samples, " in shown
    assert "longest 130 tokens, 1 dropped" in shown


def test_samples_that_are_too_long_are_refused_by_default(unreadable_base, data, tmp_path):
    told = refused(quick(unreadable_base, data, tmp_path / "run", "data.max_length=130"))

    assert "133 tokens" in told
    assert "data.max_length is 130" in told


def test_data_of_which_nothing_is_left_is_refused(unreadable_base, data, tmp_path):
    drop = ("data.max_length=10", "data.too_long=drop")

    assert "nothing is left: 4 of 4 records are dropped" in refused(
        quick(unreadable_base, data, tmp_path / "run", *drop)
    )


def test_ids_that_the_model_lacks_are_refused(qwen_vocabulary, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(GOLDEN / "model_tiny_small", base, ignore=shutil.ignore_patterns("cases*"))
    shutil.copyfile(qwen_vocabulary, base / "qwen.tiktoken")
    texts = write_texts(tmp_path / "texts.json", "Hello")

    told = refused(quick(base, texts, tmp_path / "run"))

    rows = json.loads((base / "config.json").read_text())["vocab_size"]
    assert f"texts.json#0: has the id 151645, and the model of {base} knows those below {rows}" in (
        told
    )


def test_a_base_that_is_not_whole_is_refused(unreadable_base, data, tmp_path):
    told = refused(quick(unreadable_base, data, tmp_path / "run"))

    assert "the weights cannot be read" in told
    assert not (tmp_path / "run").exists()


# --- the `trainer:` section ---


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.learning_rat=1", "did you mean `trainer.learning_rate`?"),
        ("trainer.max_grad_nrom=1", "did you mean `trainer.max_grad_norm`?"),
        ('trainer.learning_rate="1e-4"', '`trainer.learning_rate` is "1e-4"'),
        ("trainer.save_steps=often", "`trainer.save_steps` is "),
        ("trainer.per_device_train_batch_size=1.5", "should be a valid integer"),
        ("trainer.num_train_epochs=null", "should be a valid number"),
        ("trainer.weight_decay=true", "should be a valid number"),
        ("trainer.gradient_accumulation_steps=0", "should be greater than or equal to 1"),
        ("trainer.report_to=nothing", "nothing is not supported"),
        ("trainer.optim=adamz", "adamz is not a valid OptimizerNames"),
        ("dtype=fp16", "fp16 trains on a GPU only"),
    ],
)
def test_what_the_trainer_does_not_take_is_refused(base, data, tmp_path, override, message):
    if "fp16" in override and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(VltrainError) as error:
        training_arguments(quick(base, data, tmp_path / "run", override))

    assert message in str(error.value)


def test_all_values_of_a_wrong_type_are_told_together(base, data, tmp_path):
    wrong = ("trainer.seed=x", "trainer.learning_rate=[1]")

    with pytest.raises(VltrainError, match=r"(?s)trainer\.seed.*trainer\.learning_rate"):
        training_arguments(quick(base, data, tmp_path / "run", *wrong))


@pytest.mark.parametrize("method", ["lora", "full"])
def test_every_built_in_default_is_taken_by_the_trainer(method, tmp_path):
    recipe = load_recipe(
        None, method=method, model="base", data=[Path("train.json")], output=tmp_path / "run"
    )

    arguments = training_arguments(recipe)

    assert arguments.learning_rate == (1e-4 if method == "lora" else 1e-5)
    assert arguments.gradient_accumulation_steps == (8 if method == "lora" else 16)
    assert (arguments.weight_decay, arguments.adam_beta2) == (0.1, 0.95)
    assert arguments.remove_unused_columns is False
