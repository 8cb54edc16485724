"""Training steps of made-up samples, measured on a tiny model."""

import json
from pathlib import Path

import pytest
import torch
from tiny import QWEN_VL_CONFIG, write_qwen_vl

from vltrain.config import FreezeConfig, load_recipe
from vltrain.errors import VltrainError
from vltrain.models.adapters import Adapter, add_lora, set_learned
from vltrain.models.catalog import QWEN_VL
from vltrain.models.hub import ResolvedModel
from vltrain.models.qwen_vl import QwenVLConfig, QwenVLForConditionalGeneration
from vltrain.models.qwen_vl.vision import VisionTower
from vltrain.workflows import profile
from vltrain.workflows.base import Base
from vltrain.workflows.profile import in_steps_of, profile_steps, work_of_model

CONFIG = QwenVLConfig.from_published(dict(QWEN_VL_CONFIG))
HEAD = 480 * 128
PICTURE_TOKENS = len(QWEN_VL.example_picture(CONFIG).input_ids)
LAYERS = 2 * (128 * 384 + 384 + 128 * 128 + 3 * 128 * 128 + 2 * 128) + 128


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen_vl(tmp_path_factory.mktemp("profile") / "base")


@pytest.fixture(autouse=True)
def quick_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that does a thousand million operations a second."""
    monkeypatch.setattr(profile, "matmul_rate", lambda *_: 1e9)


def measured(folder: Path, output: Path, *overrides: str, **how) -> dict:
    how = {"lengths": (24,), "steps": 2} | how
    settings = [*overrides] if how.get("method") == "full" else ["lora.r=4", *overrides]
    profile_steps(None, model=str(folder), overrides=settings, output=output, **how)
    return json.loads(output.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_each_length_has_its_row_and_the_figures_fit_each_other(folder, tmp_path, capsys):
    figures = measured(folder, tmp_path / "p.json", lengths=(24, 40))

    assert [row["tokens"] for row in figures["rows"]] == [24, 40]
    for row in figures["rows"]:
        seconds = row["seconds_per_step"]
        assert seconds > 0
        assert row["tokens_per_second"] == pytest.approx(8 * row["tokens"] / seconds)
        learned = 8 * (row["tokens"] - PICTURE_TOKENS)
        assert row["learned_tokens_per_second"] == pytest.approx(learned / seconds)
        assert row["utilisation"] == pytest.approx(row["flops"] / seconds / 1e9)
        assert 0 < row["waiting_share"] < 1
        assert row["peak_gib"] is None
        assert len(row["seconds"]) == 2
    assert figures["weights"] == "real"
    assert figures["samples_per_step"] == 8
    said = capsys.readouterr().out
    assert "MFU: model FLOP utilisation, of 0.001 TFLOP/s, measured here" in said
    assert "padded, layers not compiled, gradient checkpointing on" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "overrides"),
    [
        ({"method": "full"}, ()),
        ({"method": "full"}, ("full.weights=residual",)),
        ({"method": "qlora"}, ()),
        ({"random": True}, ("lora.embeddings=true",)),
        ({}, ("data.packing=true", "memory=lean")),
        ({}, ("trainer.per_device_train_batch_size=4",)),
    ],
)
def test_every_kind_of_run_can_be_measured(folder, tmp_path, how, overrides):
    figures = measured(folder, tmp_path / "p.json", *overrides, **how)

    assert figures["rows"][0]["error"] is None
    assert figures["weights"] == ("random" if how.get("random") else "real")


@pytest.mark.slow
def test_with_kept_features_the_tower_does_not_run_in_a_step(folder, tmp_path, monkeypatch):
    seen: list[int] = []
    encode = VisionTower.encode_patches
    monkeypatch.setattr(
        VisionTower, "encode_patches", lambda *given: seen.append(1) or encode(*given)
    )

    kept = measured(folder, tmp_path / "kept.json", "data.cache_features=true")
    assert len(seen) == 1
    plain = measured(folder, tmp_path / "plain.json")
    assert len(seen) == 1 + 8 * 3

    assert kept["cached_features"] is True
    assert kept["rows"][0]["flops"] < plain["rows"][0]["flops"]


@pytest.mark.slow
def test_auto_keeps_no_features_of_a_tower_that_learns(folder, tmp_path):
    figures = measured(
        folder, tmp_path / "p.json", "data.cache_features=auto", "freeze.vision=false"
    )

    assert figures["cached_features"] is False
    assert figures["rows"][0]["error"] is None


@pytest.mark.slow
def test_a_length_that_does_not_fit_says_so_and_the_others_go_on(
    folder, tmp_path, monkeypatch, capsys
):
    train = profile._train

    def short_of_memory(subject, rate, tokens, *others):
        if tokens.longest == 30:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return train(subject, rate, tokens, *others)

    monkeypatch.setattr(profile, "_train", short_of_memory)
    figures = measured(folder, tmp_path / "p.json", lengths=(30, 24))

    first, second = figures["rows"]
    assert first["error"] == "does not fit the GPU (CUDA out of memory)"
    assert first["seconds_per_step"] is None
    assert second["error"] is None
    assert "does not fit" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["true", "false"])
def test_mixed_lengths_lie_between_those_that_are_given(folder, tmp_path, capsys, packing):
    packed = f"data.packing={packing}"
    figures = measured(folder, tmp_path / "p.json", packed, lengths=(24, 40, "mixed"), steps=3)

    row = figures["rows"][2]
    assert (row["shortest_tokens"], row["tokens"]) == (24, 40)
    tokens = row["tokens_per_second"] * row["seconds_per_step"] / 8
    learned = row["learned_tokens_per_second"] * row["seconds_per_step"] / 8
    assert 26 < tokens < 38
    assert learned == pytest.approx(tokens - PICTURE_TOKENS)
    assert "24 to 40" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("lengths", "named"), [((24, 6), "6"), (("mixed",), "no number"), ((), "no number")]
)
def test_lengths_without_room_for_a_picture_are_refused(folder, tmp_path, lengths, named):
    with pytest.raises(VltrainError, match=f"--lengths: {named} is given, and a sample with a"):
        measured(folder, tmp_path / "p.json", lengths=lengths)


def test_a_model_larger_than_the_machine_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr("os.sysconf", lambda _: 2**15)  # pages of that size, so many: 1 GiB

    with pytest.raises(VltrainError, match="of the published size: its weights take"):
        profile_steps(None, output=tmp_path / "p.json")


@pytest.mark.parametrize(
    ("overrides", "batch", "accumulation"),
    [
        ((), 1, 8),
        (("trainer.per_device_train_batch_size=2",), 2, 4),
        (("trainer.gradient_accumulation_steps=2",), 1, 8),
        (("data.packing=true",), 1, 1),
    ],
)
def test_a_step_is_8_samples_whatever_the_recipe_says(overrides, batch, accumulation):
    recipe = in_steps_of(recipe_of(*overrides), 8)

    assert recipe.trainer["per_device_train_batch_size"] == batch
    assert recipe.trainer["gradient_accumulation_steps"] == accumulation
    assert recipe.batch.samples == (8 if recipe.data.packs else None)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("trainer.per_device_train_batch_size=3", "a step of 8 samples is measured, and 3"),
        ("deepspeed=zero2", "one GPU is measured"),
    ],
)
def test_what_is_no_step_of_one_gpu_is_refused(setting, message):
    with pytest.raises(VltrainError, match=message):
        in_steps_of(recipe_of(setting), 8)


def recipe_of(*overrides: str):
    given = {"model": "base", "data": [Path("a.json")], "output": Path("run")}
    return load_recipe(None, method="lora", overrides=overrides, **given)


def model() -> QwenVLForConditionalGeneration:
    return QwenVLForConditionalGeneration(CONFIG)


def base() -> Base:
    return Base(ResolvedModel(Path("base"), None, "base"), QWEN_VL, CONFIG, None)


def test_the_work_of_a_decoder_is_that_of_its_layers_and_its_head():
    work = work_of_model(set_learned(model(), QWEN_VL, FreezeConfig()), base())

    assert (work.layers.count, work.layers.learns) == (LAYERS, True)
    assert (work.head.count, work.head.learns) == (HEAD, True)
    assert not work.vision.learns
    assert work.projector.learns
    assert (work.patches, work.image_tokens) == (16, 4)


@pytest.mark.parametrize("embeddings", [False, True])
def test_under_adapters_the_layers_are_frozen_and_count_once(embeddings):
    adapter = Adapter(r=4, embeddings=embeddings)
    work = work_of_model(add_lora(model(), QWEN_VL, FreezeConfig(), adapter, seed=0), base())

    assert (work.layers.count, work.layers.learns) == (LAYERS, False)
    assert (work.head.count, work.head.learns) == (HEAD, embeddings)
