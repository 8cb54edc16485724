"""Adapters in bfloat16 with float32 masters: learned, saved, resumed and refused."""

import shutil
from pathlib import Path

import pytest
import torch
from recipe_files import recipe_of
from runs import metrics, quick, run, weights
from tiny import write_conversations, write_qwen_vl

from vltrain.errors import VltrainError
from vltrain.training.engines import Engine
from vltrain.workflows.prepare import refuse_unfit_engine

BF16 = ("lora.weights=bf16", "trainer.max_steps=4", "trainer.save_steps=2", "lora.embeddings=true")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("bf16")
    return write_qwen_vl(folder / "base"), write_conversations(folder)


@pytest.mark.slow
def test_adapters_in_bf16_are_saved_from_their_masters_and_go_on_from_them(made, tmp_path):
    run(quick(*made, tmp_path / "a", *BF16))
    whole = weights(tmp_path / "a" / "final")
    for done in ("final", "checkpoint-4"):
        shutil.rmtree(tmp_path / "a" / done)
    halfway = weights(tmp_path / "a" / "checkpoint-2")

    assert "resuming from" in run(quick(*made, tmp_path / "a", *BF16))

    resumed = weights(tmp_path / "a" / "final")
    assert {t.dtype for t in (*whole.values(), *halfway.values())} == {torch.float32}
    for saved in (whole, halfway):
        assert any((t != t.bfloat16().float()).any() for t in saved.values()), "masters, unrounded"
    assert resumed.keys() == whole.keys() == halfway.keys()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


@pytest.mark.parametrize(
    ("overrides", "method", "words"),
    [
        (("dtype=fp32",), "lora", "beside a base in bf16, and dtype is fp32"),
        (("trainer.optim=adamw_torch",), "lora", "has an optimizer of its own"),
        ((), "qlora", "the optimizer of qlora has 8 bits"),
    ],
)
def test_what_adapters_in_bf16_do_not_go_with_is_refused(overrides, method, words):
    with pytest.raises(VltrainError, match=words):
        recipe_of("lora.weights=bf16", *overrides, method=method)


def test_processes_do_not_share_them(made, tmp_path):
    recipe = quick(*made, tmp_path / "b", "lora.weights=bf16")

    with pytest.raises(VltrainError, match="adapters in bf16 are for one process"):
        refuse_unfit_engine(recipe, Engine("ddp", "asked for"))


@pytest.mark.slow
def test_the_best_checkpoint_is_what_is_left_where_it_is_asked_for(made, tmp_path):
    best = ("trainer.load_best_model_at_end=true", "data.eval_share=0.5", "trainer.eval_steps=2")
    worst = ("trainer.metric_for_best_model=eval_loss", "trainer.greater_is_better=true")

    run(quick(*made, tmp_path / "c", *BF16, *best, *worst))

    left, first, last = (
        weights(tmp_path / "c" / name) for name in ("final", "checkpoint-2", "checkpoint-4")
    )
    assert all(torch.equal(left[name], first[name]) for name in left)
    assert not all(torch.equal(left[name], last[name]) for name in left)


@pytest.mark.slow
def test_adapters_in_bf16_lose_what_those_in_float32_lose(made, tmp_path):
    longer = (*BF16, "trainer.max_steps=12", "lora.dropout=0", "trainer.learning_rate=3e-3")
    run(quick(*made, tmp_path / "narrow", *longer))
    run(quick(*made, tmp_path / "wide", *longer, "lora.weights=fp32", "dtype=bf16"))

    narrow, wide = ([loss for _, loss in metrics(tmp_path / name)] for name in ("narrow", "wide"))
    assert narrow == pytest.approx(wide, rel=0.02)
    assert wide[-1] < 0.8 * wide[0], "enough is learned for a difference to show"
