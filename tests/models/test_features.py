"""What a frozen vision tower makes of pictures, given to the model in the place of pixels."""

import pytest
import torch
from tiny import IMAGE_START_ID, QWEN_VL_CONFIG

from vltrain.config import FreezeConfig
from vltrain.models.adapters import Adapter, add_lora, set_learned
from vltrain.models.catalog import QWEN_VL
from vltrain.models.features import compute_features, frozen_stage, stage_fingerprint
from vltrain.models.qwen_vl import QwenVLConfig, QwenVLForConditionalGeneration

IMAGE_EMBEDS, PATCH_EMBEDS = QWEN_VL.feature_stages
PICTURE = [IMAGE_START_ID, *[IMAGE_START_ID + 2] * 4, IMAGE_START_ID + 1]
IDS = torch.tensor([[*PICTURE, 5, *PICTURE, 6, *PICTURE, 7]])


@pytest.fixture
def model() -> QwenVLForConditionalGeneration:
    torch.manual_seed(0)
    return QwenVLForConditionalGeneration(QwenVLConfig.from_published(dict(QWEN_VL_CONFIG)))


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randn(3, 3, 56, 56, generator=torch.Generator().manual_seed(1))


def one_by_one(model, stage, pixels) -> torch.Tensor:
    made = [
        compute_features(model, stage, one[None], dtype=torch.float32, autocast=None)
        for one in pixels
    ]
    return torch.cat(made)


@pytest.mark.parametrize("stage", QWEN_VL.feature_stages, ids=lambda stage: stage.input_name)
def test_features_in_the_place_of_pixels_give_the_same_loss_and_gradients(model, pixels, stage):
    features = one_by_one(model, stage, pixels)
    set_learned(model, QWEN_VL, FreezeConfig(projector=stage is IMAGE_EMBEDS))
    found = []
    for pictures in ({"pixel_values": pixels}, {stage.input_name: features}):
        model.zero_grad()
        loss = model(input_ids=IDS, labels=IDS, **pictures).loss
        loss.backward()
        learned = [p.grad.clone() for p in model.parameters() if p.requires_grad]
        found.append((loss.item(), learned))

    (plain, gradients), (kept, others) = found
    assert kept == pytest.approx(plain, rel=1e-6)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(gradients, others, strict=True))
    assert any(gradient.abs().max() > 1e-4 for gradient in gradients)


@pytest.mark.parametrize("stage", QWEN_VL.feature_stages, ids=lambda stage: stage.input_name)
def test_some_pictures_may_have_features_and_others_pixels(model, pixels, stage):
    features = one_by_one(model, stage, pixels)
    mixed = {
        stage.input_name: features[[1]],
        "pixel_values": pixels[[0, 2]],
        "picture_order": torch.tensor([1, 0, 2]),
    }

    with torch.no_grad():
        plain = model(input_ids=IDS, pixel_values=pixels).logits
        both = model(input_ids=IDS, **mixed).logits

    assert torch.allclose(plain, both, atol=1e-5)
    assert not torch.allclose(plain, model(input_ids=IDS, pixel_values=pixels[[1, 0, 2]]).logits)


def test_features_of_too_few_pictures_are_refused(model, pixels):
    with pytest.raises(ValueError, match="input_ids have 12 <imgpad>, but 2 pictures"):
        model(input_ids=IDS, image_embeds=one_by_one(model, IMAGE_EMBEDS, pixels[:2]))


def test_features_and_pixels_without_an_order_are_refused(model, pixels):
    features = one_by_one(model, IMAGE_EMBEDS, pixels[:1])

    with pytest.raises(ValueError, match="need picture_order"):
        model(input_ids=IDS, image_embeds=features, pixel_values=pixels[1:])


@pytest.mark.parametrize(
    ("freeze", "stage"),
    [
        (FreezeConfig(projector=True), IMAGE_EMBEDS),
        (FreezeConfig(), PATCH_EMBEDS),
        (FreezeConfig(projector=False), PATCH_EMBEDS),
        (FreezeConfig(vision=False), None),
        (FreezeConfig(vision=False, projector=True), None),
    ],
)
def test_the_last_stage_that_only_frozen_weights_feed_is_taken(model, freeze, stage):
    assert frozen_stage(set_learned(model, QWEN_VL, freeze), QWEN_VL) is stage


@pytest.mark.parametrize(
    ("freeze", "targets", "stage"),
    [
        (FreezeConfig(), None, IMAGE_EMBEDS),
        (FreezeConfig(projector=False), None, PATCH_EMBEDS),
        (FreezeConfig(vision=False), None, None),
        (FreezeConfig(), ("c_attn", "c_fc"), None),
    ],
)
def test_under_lora_adapters_count_where_they_are(model, freeze, targets, stage):
    wrapped = add_lora(model, QWEN_VL, freeze, Adapter(r=2, targets=targets), seed=0)

    assert frozen_stage(wrapped, QWEN_VL) is stage


@pytest.mark.parametrize("stage", QWEN_VL.feature_stages, ids=lambda stage: stage.input_name)
def test_a_stage_has_the_shape_that_it_says(model, pixels, stage):
    assert one_by_one(model, stage, pixels).shape == (3, *stage.shape(model.config))


def test_the_fingerprint_is_that_of_the_weights_that_feed_a_stage(model):
    def fingerprints() -> list[str]:
        return [stage_fingerprint(model, QWEN_VL, stage) for stage in QWEN_VL.feature_stages]

    image, patch = fingerprints()
    visual = model.transformer.visual
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
        assert fingerprints() == [image, patch]
        visual.proj[0, 0] += 1
        other, same = fingerprints()
        assert other != image
        assert same == patch
        visual.conv1.weight[0, 0, 0, 0] += 1
        assert fingerprints()[1] != patch


def test_an_adapter_beside_the_tower_leaves_its_fingerprint(model):
    before = stage_fingerprint(model, QWEN_VL, IMAGE_EMBEDS)
    wrapped = add_lora(model, QWEN_VL, FreezeConfig(), Adapter(r=2), seed=0)

    assert stage_fingerprint(wrapped, QWEN_VL, IMAGE_EMBEDS) == before
