"""Where a model's parameters lie, on the device `meta` and for real."""

from pathlib import Path

import pytest
import torch
from tiny import QWEN_VL_CONFIG, write_qwen_vl

from vltrain.config import FreezeConfig
from vltrain.models.adapters import Adapter, add_lora, set_learned, widen_learned
from vltrain.models.catalog import QWEN_VL
from vltrain.models.census import skeleton, take_census
from vltrain.models.loading import load_model
from vltrain.models.qwen_vl import QwenVLConfig
from vltrain.models.sizes import AdapterSizes, DecoderSizes, PlaceWeights, TowerSizes

TINY = QwenVLConfig.from_published(dict(QWEN_VL_CONFIG))


def test_the_published_model_is_counted_part_by_part():
    model = set_learned(skeleton(QWEN_VL, QwenVLConfig(), torch.bfloat16), QWEN_VL, FreezeConfig())
    widen_learned(model)

    census = take_census(model, QWEN_VL)

    assert census.all.total == 9_656_935_168
    assert census.all.learned == 7_797_379_072
    assert {place: weights.total for place, weights in census.places.items()} == {
        "embeddings": 622_329_856,
        "layers": 6_476_660_736 + 4_096,  # and the last norm
        "head": 622_329_856,
        "vision": 1_842_770_688,
        "projector": 76_054_528 + 16_777_216 + 8_192,
    }
    assert census.at("vision").total_bytes == 2 * 1_842_770_688
    assert census.at("head").learned_bytes == 4 * 622_329_856  # what learns is float32


def test_the_published_adapter_is_counted():
    base = skeleton(QWEN_VL, QwenVLConfig(), torch.bfloat16)

    census = take_census(add_lora(base, QWEN_VL, FreezeConfig(), Adapter(), seed=0), QWEN_VL)

    # A layer: 64 x (4096 + 12288) + 64 x (4096 + 4096) + 2 x 64 x (4096 + 11008).
    learned = 32 * 3_506_176
    assert census.at("adapter") == PlaceWeights(learned, learned, learned, 4 * learned, 4 * learned)
    assert census.all.learned == learned
    assert census.adapters == AdapterSizes(
        inputs=32 * 4 * 4096,
        ranks=32 * 4 * 64,
        outputs=32 * (12288 + 4096 + 2 * 11008),
        dropout=True,
    )


@pytest.mark.parametrize("embeddings", [False, True])
def test_a_skeleton_is_counted_as_the_loaded_model_is(tmp_path: Path, embeddings):
    loaded = load_model(write_qwen_vl(tmp_path), dtype="bf16")
    adapter = Adapter(r=4, embeddings=embeddings)

    censuses = [
        take_census(add_lora(model, QWEN_VL, FreezeConfig(), adapter, seed=0), QWEN_VL)
        for model in (loaded, skeleton(QWEN_VL, TINY, torch.bfloat16))
    ]

    assert censuses[0] == censuses[1]


def test_embeddings_that_learn_beside_an_adapter_lie_in_memory_twice():
    base = skeleton(QWEN_VL, TINY, torch.bfloat16)

    census = take_census(
        add_lora(base, QWEN_VL, FreezeConfig(), Adapter(embeddings=True), seed=0), QWEN_VL
    )

    numbers = 480 * 128
    for place in ("embeddings", "head"):
        assert census.at(place) == PlaceWeights(
            total=2 * numbers,
            learned=numbers,
            learned_matrices=numbers,
            total_bytes=2 * numbers + 4 * numbers,
            learned_bytes=4 * numbers,
        )


def test_a_place_that_a_model_lacks_holds_nothing():
    model = set_learned(skeleton(QWEN_VL, TINY, torch.float32), QWEN_VL, FreezeConfig())

    assert take_census(model, QWEN_VL).at("adapter") == PlaceWeights()


def test_the_sizes_are_those_of_the_published_config():
    sizes = QwenVLConfig().model_sizes()

    assert sizes.decoder == DecoderSizes(
        layers=32,
        width=4096,
        heads=32,
        attention_width=4096,
        mlp_width=11008,
        vocabulary=151936,
    )
    assert sizes.tower == TowerSizes(
        layers=48,
        width=1664,
        heads=16,
        mlp_width=8192,
        patches=1024,
        image_tokens=256,
        marks=2,
    )
    assert sizes.loss_rows == 256
