"""What a run is told that needs more memory than there is."""

from dataclasses import replace
from pathlib import Path

import pytest

from vltrain.config import Method, Recipe, load_recipe
from vltrain.errors import VltrainError
from vltrain.models.sizes import (
    AdapterSizes,
    Census,
    DecoderSizes,
    ModelSizes,
    PlaceWeights,
    TowerSizes,
)
from vltrain.training.activations import BatchSizes, Compute
from vltrain.training.engines import Engine
from vltrain.training.memory import CONTEXT_BYTES, GIB, WORKSPACE_BYTES
from vltrain.training.moments import Work
from vltrain.training.optimizer_bytes import Optimizer
from vltrain.workflows.advice import memory_advice, refuse_what_cannot_fit
from vltrain.workflows.memory import RunMemory

MILLION = 10**6
SIZES = ModelSizes(
    DecoderSizes(2, 1024, heads=8, attention_width=1024, mlp_width=4096, vocabulary=100_000),
    TowerSizes(3, 512, heads=8, mlp_width=2048, patches=1024, image_tokens=256, marks=2),
    loss_rows=None,
)


def learned(count: int) -> PlaceWeights:
    return PlaceWeights(count, count, count, 4 * count, 4 * count)


RUN = RunMemory(
    Census(
        {
            "embeddings": learned(100 * MILLION) + PlaceWeights(100 * MILLION, 0, 0, 200 * MILLION),
            "layers": PlaceWeights(500 * MILLION, total_bytes=1000 * MILLION),
            "adapter": learned(50 * MILLION),
        },
        AdapterSizes(inputs=8192, ranks=512, outputs=16384, dropout=True),
    ),
    SIZES,
    BatchSizes(rows=4, row_tokens=1000, learned_tokens=4000, pictures=4),
    Work(Compute(2, checkpointing=False), Optimizer("adamw_torch_fused")),
)


def recipe_of(out: Path, *settings: str, method: Method = "lora") -> Recipe:
    given = ("memory=null", *settings)  # which is left to one GPU else
    return load_recipe(
        None, method=method, model="base", data=[Path("a.json")], output=out, overrides=given
    )


@pytest.mark.parametrize(
    ("method", "settings", "first_words"),
    [
        (
            "lora",
            ("trainer.gradient_checkpointing=false", "lora.embeddings=false", "data.too_long=drop"),
            ["trainer.gradient_checkpointing: true", "lora.r: 32", "vltrain qlora"],
        ),
        (
            "lora",
            ("data.packing=true",),
            ["data.max_length: 1024", "lora.embeddings: false", "lora.r: 32", "vltrain qlora"],
        ),
        (
            "lora",
            ("memory=auto", "lora.embeddings=false", "data.too_long=drop"),
            ["memory: lean", "lora.r: 32", "vltrain qlora"],
        ),
        (
            "full",
            (),
            [
                "a lower data.max_length",
                "full.weights: residual",
                "full.weights: stochastic",
                "vltrain lora",
            ],
        ),
        (
            "full",
            ("full.weights=residual",),
            ["a lower data.max_length", "full.weights: stochastic", "vltrain lora"],
        ),
        (
            "full",
            ("dtype=fp32",),
            ["a lower data.max_length", "trainer.optim: adamw_bnb_8bit", "vltrain lora"],
        ),
        (
            "qlora",
            ("lora.embeddings=false", "data.too_long=drop"),
            ["lora.r: 32", "quantize.vision: true"],
        ),
        (
            "qlora",
            ("lora.embeddings=false", "data.too_long=drop", "quantize.vision=true"),
            ["lora.r: 32"],
        ),
    ],
)
def test_advice_begins_with_what_costs_least_and_leaves_out_what_is_done(
    tmp_path: Path, method, settings, first_words
):
    advice = memory_advice(recipe_of(tmp_path / "run", *settings, method=method))

    assert len(advice) == len(first_words)
    assert all(line.startswith(words) for line, words in zip(advice, first_words, strict=True))


def told(line: str) -> float:
    """The GiB at the end of a line of advice."""
    return float(line.rpartition("(about ")[2].removesuffix(" GiB)"))


def test_each_change_says_what_it_comes_to(tmp_path: Path):
    settings = (
        "trainer.gradient_checkpointing=false",
        "trainer.per_device_train_batch_size=4",
        "data.packing=true",
    )

    lines = memory_advice(recipe_of(tmp_path, *settings), RUN)

    now = RUN.estimate.needed / GIB
    assert len(lines) == 6
    assert all(told(line) < now for line in lines[:5])
    assert lines[5].startswith("vltrain qlora")
    logits = 2000 * 100_000 * 12  # of half the tokens, on their way back
    assert told(lines[1]) < now - logits / GIB
    # Embeddings that rest leave no copy, no gradient and no states: 16 bytes each.
    assert told(lines[3]) == pytest.approx(now - 16 * 100 * MILLION / GIB, abs=0.2)
    # Half the rank: half of 16 bytes for each weight, and of the copies in bf16.
    assert told(lines[4]) == pytest.approx(now - 18 * 25 * MILLION / GIB, abs=0.2)


def test_layers_that_keep_a_share_may_keep_nothing_but_their_input(tmp_path: Path):
    recipe = recipe_of(tmp_path, "compile=true", "memory=0.5")
    compute = Compute(2, checkpointing=False, kept_share=0.5, compiled=True)
    run, recomputed = (
        replace(RUN, work=replace(RUN.work, compute=way))
        for way in (compute, compute.all_recomputed())
    )

    line = memory_advice(recipe, run)[0]

    assert line.startswith("memory: lean; the losses stay")
    assert told(line) == pytest.approx(recomputed.estimate.needed / GIB, abs=0.06)
    assert told(line) < run.estimate.needed / GIB
    assert not any("memory: lean" in line for line in memory_advice(recipe, recomputed))


def test_an_eight_bit_optimizer_leaves_a_quarter_of_the_states(tmp_path: Path):
    lines = memory_advice(recipe_of(tmp_path, "dtype=fp32", method="full"), RUN)

    saved = 150 * MILLION * (8 - 2 * (1 + 4 / 256)) / GIB
    assert told(lines[1]) == pytest.approx(RUN.estimate.needed / GIB - saved, abs=0.06)
    assert lines[0].startswith("a lower data.max_length")  # by how much is the user's to say


def test_processes_that_share_a_model_are_told_of_the_optimizer_alone(tmp_path: Path):
    shared = replace(RUN, engine=Engine("ddp", "several processes"))

    lines = memory_advice(recipe_of(tmp_path, method="full"), shared)

    assert lines[1].startswith("trainer.optim: adamw_bnb_8bit")


def test_weights_in_bf16_take_half_and_less(tmp_path: Path):
    lines = memory_advice(recipe_of(tmp_path, method="full"), RUN)

    now, learned_weights = RUN.estimate.needed / GIB, 150 * MILLION / GIB
    # Of the 16 bytes 8 are left, and 6, with 4 / 256 for each moment's scales; the hidden states
    # are half as wide; autocast has no copies to make of the adapter (2 bytes).
    hidden = 4000 * 1024 * 2 / GIB
    for line, left in ((lines[1], 8), (lines[2], 6)):
        expected = now - learned_weights * (16 - left - 8 / 256) - hidden - 2 * 50 * MILLION / GIB
        assert told(line) == pytest.approx(expected, abs=0.07)


def test_a_packed_tower_takes_a_quarter(tmp_path: Path):
    tower = PlaceWeights(1000 * MILLION, total_bytes=2000 * MILLION)
    census = replace(RUN.census, places={**RUN.census.places, "vision": tower})
    run = replace(RUN, census=census)

    line = memory_advice(recipe_of(tmp_path, method="qlora"), run)[-1]

    saved = 1000 * MILLION * (2 - 33 / 64) / GIB
    assert told(line) == pytest.approx(run.estimate.needed / GIB - saved, abs=0.06)


def test_only_what_is_over_by_more_than_the_estimates_error_is_refused(tmp_path: Path):
    recipe, needed = recipe_of(tmp_path), RUN.estimate.needed

    refuse_what_cannot_fit(recipe, RUN, round(0.91 * needed))
    with pytest.raises(VltrainError) as error:
        refuse_what_cannot_fit(recipe, RUN, round(0.89 * needed))

    assert "lora.r: 32; smaller adapters (about" in str(error.value)
    assert "vltrain qlora" in str(error.value)
    assert str(error.value).endswith("memory_check: false; the run is tried as it is")


def test_an_empty_run_needs_what_driver_and_libraries_take(tmp_path: Path):
    batch = replace(RUN.batch, rows=0, row_tokens=0, learned_tokens=0, pictures=0)
    empty = replace(RUN, census=Census({}, AdapterSizes()), batch=batch)

    assert empty.estimate.needed == CONTEXT_BYTES + WORKSPACE_BYTES
