"""A recipe to its end: what a run leaves behind."""

import io
import json
import math
import shutil
import subprocess
import sys

import pytest
import torch
from rich.console import Console
from runs import metrics, quick, refused, run, same, weights
from safetensors.torch import save_file
from tiny import write_qwen_vl

from vltrain.config import load_recipe
from vltrain.models import load_model, load_processor
from vltrain.models.fingerprint import weights_hash
from vltrain.workflows.merge import merge


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
