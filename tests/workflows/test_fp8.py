"""Runs whose base is in fp8: they learn, save what any adapter is, go on, and are refused."""

import json
import shutil
from pathlib import Path

import pytest
from engine_place import losses, make_place, run_together
from peft import LoraConfig
from recipe_files import recipe_of
from runs import metrics, quick, refused, run, weights
from tiny import QWEN_VL_CONFIG, write_conversations, write_qwen_vl

from vltrain.errors import VltrainError
from vltrain.models.adapted import find_base, load_adapted
from vltrain.training.engines import Engine
from vltrain.workflows.estimate import estimate_run
from vltrain.workflows.merge import merge
from vltrain.workflows.prepare import refuse_unfit_engine

FP8 = "lora.base=fp8"
LONGER = ("trainer.max_steps=16", "trainer.learning_rate=1e-2", "lora.dropout=0", "dtype=bf16")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("fp8")
    return write_qwen_vl(folder / "base"), write_conversations(folder)


@pytest.fixture(scope="module")
def runs(made: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run with a base in bf16 and in fp8."""
    folder = tmp_path_factory.mktemp("runs")
    run(quick(*made, folder / "bf16", *LONGER))
    run(quick(*made, folder / "fp8", *LONGER, FP8))
    return folder


@pytest.mark.slow
def test_a_base_in_fp8_loses_what_one_in_bf16_loses(runs):
    narrow, wide = ([loss for _, loss in metrics(runs / name)] for name in ("fp8", "bf16"))

    assert narrow == pytest.approx(wide, rel=0.002)
    assert narrow != wide
    assert wide[-1] < 0.93 * wide[0], "enough is learned for a difference to show"


@pytest.mark.slow
def test_its_adapter_is_one_of_the_base_on_the_disk(made, runs):
    ours, theirs = (weights(runs / name / "final") for name in ("fp8", "bf16"))

    assert {k: (t.shape, t.dtype) for k, t in ours.items()} == {
        k: (t.shape, t.dtype) for k, t in theirs.items()
    }
    said = [json.loads((runs / n / "final" / "vltrain.json").read_text()) for n in ("fp8", "bf16")]
    assert said[0] == said[1]
    adapted = load_adapted(runs / "fp8" / "final", find_base(runs / "fp8" / "final"))
    base = weights(made[0])["transformer.h.0.attn.c_attn.weight"]
    held = adapted.get_base_model().transformer.h[0].attn.c_attn.base_layer.weight
    assert base.equal(held.detach())


@pytest.mark.slow
def test_its_adapter_is_merged_into_the_base_on_the_disk(runs, tmp_path):
    merge(runs / "fp8" / "final", tmp_path / "merged")

    assert (tmp_path / "merged" / "merge.json").is_file()


@pytest.mark.slow
def test_a_run_that_was_cut_off_goes_on_as_if_it_had_not_been(made, tmp_path):
    recipe = quick(*made, tmp_path / "a", FP8, "trainer.save_steps=3")
    run(recipe)
    whole, learned = metrics(tmp_path / "a"), weights(tmp_path / "a" / "final")
    for done in ("final", "checkpoint-6"):
        shutil.rmtree(tmp_path / "a" / done)

    assert "resuming from" in run(recipe)

    assert metrics(tmp_path / "a") == whole
    again = weights(tmp_path / "a" / "final")
    assert all(again[name].equal(learned[name]) for name in learned)


@pytest.mark.slow
def test_the_best_checkpoint_is_what_is_left_where_it_is_asked_for(made, tmp_path):
    best = ("trainer.load_best_model_at_end=true", "data.eval_share=0.5", "trainer.save_steps=3")
    worst = ("trainer.metric_for_best_model=eval_loss", "trainer.greater_is_better=true")

    run(quick(*made, tmp_path / "b", FP8, *best, *worst))

    left, first = (weights(tmp_path / "b" / name) for name in ("final", "checkpoint-3"))
    assert all(left[name].equal(first[name]) for name in left)


@pytest.mark.slow
@pytest.mark.parametrize(
    "beside",
    [
        ("lora.start=pissa",),
        ("lora.weights=bf16",),
        ("lora.embeddings=true", "freeze.vision=false", "freeze.projector=false"),
        ("memory=lean", "data.packing=true", "data.max_length=200"),
    ],
)
def test_other_options_go_with_it(made, tmp_path, beside):
    said = run(quick(*made, tmp_path / "c", FP8, *beside))

    assert "frozen layers of the language model: fp8" in said
    found = [loss for _, loss in metrics(tmp_path / "c")]
    assert found[-1] < found[0]


@pytest.mark.slow
@pytest.mark.matrix
@pytest.mark.parametrize("dtype", ["auto", "bf16"])
def test_two_processes_lose_what_one_loses(tmp_path, dtype):
    place = make_place(tmp_path)
    settings = (FP8, f"dtype={dtype}", "trainer.max_steps=3")
    twice = "trainer.gradient_accumulation_steps=2"
    run(place.recipe("one", "lora", *settings, "trainer.gradient_accumulation_steps=4"))
    engines = {"ddp": "engine=ddp", "zero2": "deepspeed=zero2"}
    recipes = [place.recipe(n, "lora", *settings, twice, engine) for n, engine in engines.items()]

    run_together(2, recipes, tmp_path)

    for name in engines:
        within = 1e-4 if dtype == "auto" else 0.02
        assert losses(place.runs / name) == pytest.approx(losses(place.runs / "one"), abs=within)


@pytest.mark.parametrize(
    ("method", "overrides", "words"),
    [
        ("qlora", (), r"lora\.base.*layers of a qlora run have 4 bits"),
        ("lora", ("dtype=fp16",), "fp8 stands in the place of bf16, and dtype is fp16"),
        ("lora", ("dtype=fp32",), "fp8 stands in the place of bf16, and dtype is fp32"),
        ("lora", ("lora.dora=true",), "DoRA measures the base's weights in each step"),
        ("full", (), "a full run has no adapter"),
    ],
)
def test_what_fp8_does_not_go_with_is_refused(method, overrides, words):
    with pytest.raises(VltrainError, match=words):
        recipe_of(FP8, *overrides, method=method)


def test_an_adapter_of_dora_is_not_continued_in_fp8(made, tmp_path):
    LoraConfig(use_dora=True).save_pretrained(tmp_path / "dora")

    said = refused(quick(*made, tmp_path / "f", FP8, f"lora.continue_from={tmp_path / 'dora'}"))

    assert "lora.base: does not go with" in said
    assert "which is of DoRA" in said


@pytest.mark.parametrize(
    "engine",
    [
        Engine("fsdp2", "asked for", layers=("DecoderLayer",)),
        Engine("deepspeed", "asked for", {"zero_optimization": {"stage": 3}}),
    ],
)
def test_engines_that_share_weights_out_are_refused(made, tmp_path, engine):
    with pytest.raises(VltrainError, match="shares weights out, and those in fp8 are whole"):
        refuse_unfit_engine(quick(*made, tmp_path / "d", FP8), engine)


def test_widths_that_do_not_fit_are_refused_before_the_model_is_loaded(made, tmp_path):
    odd = QWEN_VL_CONFIG | {"intermediate_size": 2 * 120}
    base = write_qwen_vl(tmp_path / "base", config=odd)
    (base / "model.safetensors").write_bytes(b"no weights")

    assert "mlp.w1 is 128 x 120" in refused(quick(base, made[1], tmp_path / "e", FP8))
    assert not (tmp_path / "e").exists()


def test_an_estimate_is_that_of_a_base_in_bf16(made, capsys):
    said = []
    for overrides in ((), (FP8,)):
        estimate_run(None, model=str(made[0]), overrides=overrides, memory_gib=80, as_json=True)
        said.append(json.loads(capsys.readouterr().out))

    assert said[0] == said[1]
