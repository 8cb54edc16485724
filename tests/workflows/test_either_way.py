"""Runs that are packed on one machine and plain on another: the same steps."""

import shutil
from dataclasses import replace

import pytest
from runs import metrics, quick, run

import vltrain.workflows.guard
import vltrain.workflows.train
from vltrain.config import Recipe
from vltrain.workflows.settle import settled

SETTINGS = ("lora.dropout=0", "trainer.save_steps=3", "trainer.learning_rate=1e-3", "dtype=bf16")


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Let runs from here on be packed as they are on a GPU, and not compiled."""

    def switch() -> None:
        def packed(recipe: Recipe, engine, *, processes: int) -> Recipe:
            there = settled(recipe, engine, processes=processes, on_gpu=True)
            return replace(there, compile=False, memory=None)

        monkeypatch.setattr(vltrain.workflows.train, "settled", packed)

    return switch


@pytest.mark.parametrize("packed_first", [False, True])
def test_a_run_goes_on_with_its_samples_where_it_is_packed_otherwise(
    packed_first, base, data, tmp_path, monkeypatch, as_on_a_gpu
):
    recipe, out = quick(base, data, tmp_path / "run", *SETTINGS), tmp_path / "run"
    if packed_first:
        with monkeypatch.context():
            as_on_a_gpu()
            first = run(recipe)
    else:
        first = run(recipe)
    whole, learned = metrics(out), metrics(out, "learned_tokens")
    for folder in ("final", "checkpoint-6"):
        shutil.rmtree(out / folder)
    if packed_first:
        monkeypatch.setattr(vltrain.workflows.train, "settled", settled)
    else:
        as_on_a_gpu()

    then = run(recipe)

    said = "the 2 samples of each step are packed into rows"
    assert ((said in first), (said in then)) == (packed_first, not packed_first)
    assert "resuming from" in then
    assert metrics(out, "learned_tokens") == learned
    assert [loss for _, loss in metrics(out)] == pytest.approx(
        [loss for _, loss in whole], rel=0.02
    )


def test_where_memory_does_not_suffice_rows_of_a_run_are_shorter(
    base, data, tmp_path, monkeypatch, as_on_a_gpu
):
    as_on_a_gpu()
    shown = []
    for size in (2**34, 2**20):
        monkeypatch.setattr(vltrain.workflows.guard, "gpu_memory", lambda size=size: size)
        out = tmp_path / str(size)
        settings = ("memory_check=false", "trainer.gradient_accumulation_steps=4")
        shown.append(run(quick(base, data, out, *SETTINGS, *settings)))

    assert "packed into rows of up to 8,192 tokens" in shown[0]
    assert "packed into rows of up to 8,192 tokens" not in shown[1]
    wide, narrow = (metrics(tmp_path / str(size)) for size in (2**34, 2**20))
    assert [x for _, x in narrow] == pytest.approx([x for _, x in wide], rel=0.02)
