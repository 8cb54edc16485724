"""What a recipe says of how a model learns, in whole runs: weights, rates, adapters' options."""

import io
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel
from rich.console import Console
from runs import metrics, quick, refused, run, weights
from tiny import write_qwen_vl

from vltrain.models import load_model
from vltrain.training.run_dir import RunDir
from vltrain.workflows.merge import merge

SHORT = ("trainer.max_steps=3", "trainer.warmup_steps=0")
QUIET = Console(file=io.StringIO())


@pytest.mark.slow
@pytest.mark.parametrize("held", ["residual", "stochastic"])
def test_weights_in_bfloat16_learn_and_a_run_that_was_cut_off_is_the_same(
    base, data, tmp_path, held
):
    settings = (f"full.weights={held}", "trainer.save_steps=3", "trainer.learning_rate=1e-3")
    recipe = quick(base, data, tmp_path / "run", *settings, method="full")
    shown = run(recipe)
    whole, final = metrics(tmp_path / "run"), weights(tmp_path / "run" / "final")
    for name in ("final", "checkpoint-6"):
        (tmp_path / "run" / name).rename(tmp_path / name)

    again = run(recipe)

    assert f"(full.weights: {held})" in shown
    assert whole[-1][1] < whole[0][1] - 0.5
    assert "resuming from" in again
    assert metrics(tmp_path / "run") == whole
    after = weights(tmp_path / "run" / "final")
    assert all(torch.equal(after[name], tensor) for name, tensor in final.items())


def test_parts_learn_at_the_rates_that_a_recipe_gives_them(base, data, tmp_path):
    rates = ("lr.projector=1e-30", "lr.language=1e-2")  # the first is too little to see
    run(quick(base, data, tmp_path / "run", *SHORT, *rates, method="full"))

    before, after = weights(base), weights(tmp_path / "run" / "final")
    moved = {name for name in before if not torch.allclose(before[name], after[name], atol=1e-6)}
    assert "lm_head.weight" in moved
    assert not any("attn_pool" in name for name in moved)


@pytest.mark.slow
def test_vision_tower_and_projector_learn_beside_adapters_and_come_back_in_merge(
    base, data, tmp_path
):
    learning = ("freeze.vision=false", "freeze.projector=false", "lr.vision=1e-3")
    recipe = quick(base, data, tmp_path / "run", *learning, "trainer.save_steps=3")
    run(recipe)
    whole, final = metrics(tmp_path / "run"), weights(tmp_path / "run" / "final")
    merge(tmp_path / "run" / "final", tmp_path / "merged", console=QUIET)
    for name in ("final", "checkpoint-6"):
        (tmp_path / "run" / name).rename(tmp_path / name)

    run(recipe)

    assert metrics(tmp_path / "run") == whole
    after = weights(tmp_path / "run" / "final")
    assert all(torch.equal(after[name], tensor) for name, tensor in final.items())
    before, merged = weights(base), weights(tmp_path / "merged")
    changed = {name for name in before if not torch.equal(before[name], merged[name])}
    assert {f"transformer.visual.{n}" for n in ("conv1.weight", "attn_pool.query")} <= changed
    assert "transformer.visual.proj" not in changed


def test_an_adapters_options_stand_in_its_folder(base, data, tmp_path):
    options = ("lora.dora=true", "lora.rslora=true", "lora.plus=4", "lora.rank_pattern={w1: 2}")
    run(quick(base, data, tmp_path / "run", *SHORT, *options))

    config = PeftConfig.from_pretrained(str(tmp_path / "run" / "final"))
    assert (config.use_dora, config.use_rslora, config.rank_pattern) == (True, True, {"w1": 2})
    merge(tmp_path / "run" / "final", tmp_path / "merged", console=QUIET)


@pytest.mark.slow
def test_an_adapter_that_began_at_the_bases_directions_is_plain_lora_in_the_end(
    base, data, tmp_path
):
    recipe = quick(base, data, tmp_path / "run", "lora.start=pissa", "trainer.save_steps=3")
    run(recipe)
    whole, final = metrics(tmp_path / "run"), weights(tmp_path / "run" / "final")
    for name in ("final", "checkpoint-6"):
        (tmp_path / "run" / name).rename(tmp_path / name)

    run(recipe)

    assert metrics(tmp_path / "run") == whole
    after = weights(tmp_path / "run" / "final")
    assert all(torch.equal(after[name], tensor) for name, tensor in final.items())
    config = PeftConfig.from_pretrained(str(tmp_path / "run" / "final"))
    assert (config.r, config.init_lora_weights) == (8, True)
    merge(tmp_path / "run" / "final", tmp_path / "merged", console=QUIET)


@pytest.mark.slow
def test_a_run_goes_on_from_an_earlier_adapter_and_takes_its_shape(base, data, tmp_path):
    shape = ("lora.alpha=32", "freeze.projector=false")
    run(quick(base, data, tmp_path / "first", *shape))
    earlier = tmp_path / "first" / "final"

    settings = (f"lora.continue_from={earlier}", "freeze.projector=false", *SHORT)
    run(quick(base, data, tmp_path / "second", *settings))

    first, second = metrics(tmp_path / "first"), metrics(tmp_path / "second")
    assert second[0][1] < (first[0][1] + first[-1][1]) / 2
    config = PeftConfig.from_pretrained(str(tmp_path / "second" / "final"))
    assert (config.r, config.lora_alpha) == (4, 32)
    assert weights(earlier).keys() == weights(tmp_path / "second" / "final").keys()
    adapted = PeftModel.from_pretrained(load_model(base), str(tmp_path / "second" / "final"))
    assert adapted.peft_config["default"].r == 4


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("lora.r=16",), "lora.r (4 there, 16 here)"),
        (("lora.dora=true",), "lora.dora"),
        (("freeze.projector=false",), "freeze and lora.embeddings"),
        (("lora.embeddings=true",), "freeze and lora.embeddings"),
    ],
)
def test_a_recipe_that_describes_another_adapter_than_it_continues_is_refused(
    base, data, tmp_path, earlier, settings, words
):
    told = refused(quick(base, data, tmp_path / "run", f"lora.continue_from={earlier}", *settings))

    assert words in told
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.fixture(scope="module")
def earlier(base, data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("earlier") / "run"
    run(quick(base, data, out, "trainer.max_steps=1"))
    return RunDir(out).final


def test_an_adapter_of_another_base_is_not_continued(data, tmp_path, earlier):
    other = write_qwen_vl(tmp_path / "other", seed=1)

    told = refused(quick(other, data, tmp_path / "run", f"lora.continue_from={earlier}"))

    assert f"was not trained on the weights in {other}" in told


def test_a_folder_that_is_no_adapter_is_not_continued(base, data, tmp_path):
    told = refused(quick(base, data, tmp_path / "run", f"lora.continue_from={base}"))

    assert f"{base}: is no LoRA adapter" in told
