"""Runs that take what a frozen vision tower makes of pictures from the disk."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from runs import metrics, quick, refused, run, weights
from tiny import write_conversations, write_qwen_vl

from vltrain.errors import VltrainError
from vltrain.models.catalog import QWEN_VL
from vltrain.models.qwen_vl.vision import VisionTower
from vltrain.training.engines import Engine
from vltrain.workflows.cache import cache_features
from vltrain.workflows.features import reason_against
from vltrain.workflows.run_data import Halves

pytestmark = pytest.mark.slow

ONE_BY_ONE = ("trainer.gradient_accumulation_steps=1", "trainer.max_steps=4")
PACKED = ("data.packing=true", "data.max_length=270")
IN_STEPS = (*PACKED, "batch.samples=2")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen_vl(tmp_path_factory.mktemp("features") / "base")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Four records that show one picture each."""
    file = write_conversations(tmp_path / "data")
    records = json.loads(file.read_text(encoding="utf-8"))
    turn = records[2]["conversations"][0]
    turn["value"] = "Picture 1: <img>images/blue.png</img>\n在哪里？"
    file.write_text(json.dumps(records), encoding="utf-8")
    return file


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pictures the ViT has been given, call by call."""
    calls: list[int] = []
    encode = VisionTower.encode_patches

    def counting(tower: VisionTower, pixel_values: torch.Tensor) -> torch.Tensor:
        calls.append(len(pixel_values))
        return encode(tower, pixel_values)

    monkeypatch.setattr(VisionTower, "encode_patches", counting)
    return calls


def recipe(base: Path, data: Path, out: Path, *overrides: str, method: str = "lora", kept="true"):
    settings = (f"data.cache_features={kept}", f"data.cache_dir={data.parent / 'cache'}")
    return quick(base, data, out, *ONE_BY_ONE, *settings, *overrides, method=method)


def same(one: Path, other: Path) -> bool:
    """Whether two runs had the same losses and made the same weights, to the bit."""
    made, also = weights(one / "final"), weights(other / "final")
    return metrics(one) == metrics(other) and all(torch.equal(made[k], also[k]) for k in made)


def kept_files(data: Path) -> list[Path]:
    return sorted((data.parent / "cache" / "features").glob("*/pictures/*/*"))


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("lora", ()),
        ("lora", ("freeze.projector=false",)),
        ("lora", ("lora.embeddings=true",)),
        ("lora", ("data.eval_share=0.25",)),
        ("lora", ("trainer.dataloader_num_workers=2",)),
        ("full", ()),
        ("full", ("freeze.projector=true",)),
    ],
)
def test_a_run_with_kept_features_is_to_the_bit_one_without(
    base, data, tmp_path, method: str, settings: tuple[str, ...]
):
    run(recipe(base, data, tmp_path / "plain", *settings, method=method, kept="false"))
    run(recipe(base, data, tmp_path / "kept", *settings, method=method))

    assert same(tmp_path / "plain", tmp_path / "kept")
    assert len(kept_files(data)) == 4


@pytest.mark.parametrize(
    "settings",
    [PACKED, IN_STEPS, ("trainer.per_device_train_batch_size=3",)],
    ids=["packed", "packed step by step", "padded"],
)
def test_pictures_encoded_together_differ_from_kept_ones_by_rounding_alone(
    base, data, tmp_path, settings: tuple[str, ...]
):
    run(recipe(base, data, tmp_path / "plain", *settings, kept="false"))
    run(recipe(base, data, tmp_path / "kept", *settings))

    plain, kept = metrics(tmp_path / "plain"), metrics(tmp_path / "kept")
    assert [loss for _, loss in kept] == pytest.approx([loss for _, loss in plain], rel=1e-5)


def test_the_vit_sees_each_picture_once(base, data, tmp_path, encoded):
    said = run(recipe(base, data, tmp_path / "run", "trainer.max_steps=9"))

    assert encoded == [1, 1, 1, 1]
    assert "features: 4 pictures, 0 of them kept before" in said


def test_a_second_run_encodes_nothing(base, data, tmp_path, encoded):
    run(recipe(base, data, tmp_path / "first"))
    encoded.clear()
    said = run(recipe(base, data, tmp_path / "second"))

    assert encoded == []
    assert "features: 4 pictures, 4 of them kept before" in said
    assert same(tmp_path / "first", tmp_path / "second")


def test_a_picture_that_has_changed_is_encoded_again(base, data, tmp_path, encoded):
    run(recipe(base, data, tmp_path / "first"))
    encoded.clear()
    Image.new("RGB", (56, 56), "yellow").save(data.parent / "images" / "red.png")
    run(recipe(base, data, tmp_path / "second"))

    assert encoded == [1]
    assert len(kept_files(data)) == 5


def test_a_copy_of_a_picture_needs_no_features_of_its_own(base, data, tmp_path, encoded):
    images = data.parent / "images"
    shutil.copy(images / "red.png", images / "black.png")
    run(recipe(base, data, tmp_path / "run"))

    assert encoded == [1, 1, 1]
    assert len(kept_files(data)) == 3


def test_features_of_other_weights_are_not_taken(base, data, tmp_path, encoded):
    run(recipe(base, data, tmp_path / "first"))
    encoded.clear()
    other = write_qwen_vl(tmp_path / "other", seed=1)
    run(recipe(other, data, tmp_path / "second"))

    assert encoded == [1, 1, 1, 1]
    assert len(kept_files(data)) == 8


def test_features_of_another_dtype_are_not_taken(base, data, tmp_path, encoded):
    run(recipe(base, data, tmp_path / "first"))
    encoded.clear()
    run(recipe(base, data, tmp_path / "second", "dtype=bf16"))

    assert encoded == [1, 1, 1, 1]
    assert {file.stat().st_size for file in kept_files(data)} == {4 * 128 * 4, 4 * 128 * 2}


def test_in_bf16_the_losses_are_the_same_too(base, data, tmp_path):
    run(recipe(base, data, tmp_path / "plain", "dtype=bf16", kept="false"))
    run(recipe(base, data, tmp_path / "kept", "dtype=bf16"))

    assert same(tmp_path / "plain", tmp_path / "kept")


def test_what_does_not_fit_the_limit_is_computed(base, data, tmp_path, encoded, caplog):
    two = 2 * 4 * 128 * 4 / 2**30
    run(recipe(base, data, tmp_path / "plain", kept="false"))
    encoded.clear()
    run(recipe(base, data, tmp_path / "kept", f"data.features_max_gib={two}"))

    assert len(kept_files(data)) == 2
    assert "features of 2 pictures do not fit data.features_max_gib" in caplog.text
    assert encoded == [1, 1, 1, 1]  # two before the first step, two in the steps
    assert same(tmp_path / "plain", tmp_path / "kept")


def test_kept_and_computed_pictures_may_be_in_one_batch(base, data, tmp_path):
    two = 2 * 4 * 128 * 4 / 2**30
    settings = ("trainer.per_device_train_batch_size=4",)
    run(recipe(base, data, tmp_path / "plain", *settings, kept="false"))
    run(recipe(base, data, tmp_path / "kept", *settings, f"data.features_max_gib={two}"))

    plain, kept = metrics(tmp_path / "plain"), metrics(tmp_path / "kept")
    assert [loss for _, loss in kept] == pytest.approx([loss for _, loss in plain], rel=1e-5)


def test_half_a_file_is_not_read(base, data, tmp_path, encoded):
    run(recipe(base, data, tmp_path / "first"))
    encoded.clear()
    file = kept_files(data)[0]
    os.truncate(file, 100)
    run(recipe(base, data, tmp_path / "second"))

    assert encoded == [1]
    assert file.stat().st_size == 4 * 128 * 4
    assert same(tmp_path / "first", tmp_path / "second")


def test_a_disk_that_is_too_small_is_told_before_the_first_step(base, data, tmp_path, monkeypatch):
    monkeypatch.setattr("vltrain.workflows.features.SPARE_BYTES", 2**60)

    assert "the features of all pictures take" in refused(recipe(base, data, tmp_path / "run"))
    said = run(recipe(base, data, tmp_path / "auto", "trainer.max_steps=8", kept="auto"))
    assert "features: computed in each step; those of 4 pictures do not fit" in said


def test_auto_keeps_features_that_are_used_more_than_once(base, data, tmp_path):
    said = run(recipe(base, data, tmp_path / "once", "trainer.max_steps=4", kept="auto"))
    assert "features: computed in each step; each picture is shown once" in said
    assert kept_files(data) == []

    run(recipe(base, data, tmp_path / "twice", "trainer.max_steps=8", kept="auto"))
    assert len(kept_files(data)) == 4


def test_a_vision_tower_that_learns_is_refused_by_its_key(base, data, tmp_path):
    with pytest.raises(VltrainError, match=r"the vision tower learns \(freeze.vision: false\)"):
        recipe(base, data, tmp_path / "run", "freeze.vision=false")


def test_adapters_in_the_vision_tower_are_refused(base, data, tmp_path):
    targets = "lora.targets=['c_attn', 'c_fc']"

    said = refused(recipe(base, data, tmp_path / "run", targets))

    assert "data.cache_features: cannot be: the vision tower learns" in said


def test_streams_are_refused_by_their_key(base, data, tmp_path):
    with pytest.raises(VltrainError, match="are not known before they come"):
        recipe(base, data, tmp_path / "run", "data.streaming=true")


def test_a_picture_that_is_broken_inside_is_dropped_as_before(base, data, tmp_path):
    red = data.parent / "images" / "red.png"
    content = bytearray(red.read_bytes())
    content[len(content) // 2] ^= 255
    red.write_bytes(content)
    drop = "data.bad_pictures=drop"
    run(recipe(base, data, tmp_path / "plain", drop, kept="false"))
    run(recipe(base, data, tmp_path / "kept", drop))

    assert metrics(tmp_path / "kept", "dropped_samples") == [
        (step, 1) for step, _ in metrics(tmp_path / "plain", "dropped_samples")
    ]
    assert len(metrics(tmp_path / "kept", "dropped_samples")) == 1
    assert same(tmp_path / "plain", tmp_path / "kept")


def test_q_lora_keeps_the_features_of_its_4_bit_vision_tower_apart(base, data, tmp_path, encoded):
    run(recipe(base, data, tmp_path / "plain", method="qlora"))
    encoded.clear()
    vision = "quantize.vision=true"
    run(recipe(base, data, tmp_path / "computed", vision, method="qlora", kept="false"))
    encoded.clear()
    run(recipe(base, data, tmp_path / "kept", vision, method="qlora"))

    assert encoded == [1, 1, 1, 1]
    assert same(tmp_path / "computed", tmp_path / "kept")


def test_features_made_beforehand_are_those_of_the_run(base, data, tmp_path, encoded, capsys):
    settings = ["lora.r=4", f"data.cache_dir={data.parent / 'cache'}"]
    cache_features(None, model=str(base), data=[data], overrides=settings)
    assert encoded == [1, 1, 1, 1]
    assert "features: 4 pictures, 0 of them kept before" in capsys.readouterr().out
    encoded.clear()

    run(recipe(base, data, tmp_path / "kept"))
    assert encoded == []
    run(recipe(base, data, tmp_path / "plain", kept="false"))
    assert same(tmp_path / "plain", tmp_path / "kept")


def test_features_made_beforehand_are_kept_apart_by_what_the_engine_computes_in(base, data, capsys):
    settings = ["dtype=bf16", f"data.cache_dir={data.parent / 'cache'}"]
    cache_features(None, model=str(base), data=[data], overrides=settings)
    capsys.readouterr()

    for kept in (0, 4):  # DeepSpeed computes without autocast
        cache_features(None, model=str(base), data=[data], overrides=[*settings, "deepspeed=zero2"])
        assert f"features: 4 pictures, {kept} of them kept before" in capsys.readouterr().out


def test_nothing_is_made_beforehand_for_an_engine_that_shares_weights_out(base, data):
    settings = ["deepspeed=zero3", f"data.cache_dir={data.parent / 'cache'}"]

    with pytest.raises(VltrainError, match="shares out the weights that they follow from"):
        cache_features(None, model=str(base), data=[data], overrides=settings)


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("freeze.vision=false", "the vision tower learns"),
        ("data.streaming=true", "records are streamed"),
    ],
)
def test_nothing_is_made_beforehand_that_no_run_could_read(base, data, setting, reason):
    settings = [setting, "trainer.max_steps=4"]

    with pytest.raises(VltrainError, match=f"no features of its pictures can be kept: {reason}"):
        cache_features(None, model=str(base), data=[data], overrides=settings)


def zero(stage: int) -> dict:
    return {"zero_optimization": {"stage": stage}}


@pytest.mark.parametrize(
    ("engine", "reason"),
    [
        (Engine("ddp", "asked for"), None),
        (Engine("deepspeed", "asked for", zero(2)), None),
        (Engine("deepspeed", "asked for", zero(3)), "shares out the weights"),
        (Engine("fsdp2", "asked for"), "shares out the weights"),
    ],
    ids=str,
)
def test_engines_that_share_weights_out_keep_no_features(engine, reason):
    halves = Halves(train=None, evaluation=None)

    found = reason_against(QWEN_VL.feature_stages[0], halves, engine)

    assert found is None if reason is None else reason in found
