"""How a family is told, and which part of it a parameter belongs to."""

import json
from pathlib import Path

import pytest

from vltrain.errors import VltrainError
from vltrain.models.catalog import QWEN_VL, family_of, is_chat_tuned, read_json
from vltrain.models.family import Parts, has_prefix

PARTS = Parts(
    vision=("model.visual",),
    projector=("model.visual.merger",),
    language=("model", "lm_head"),
)


@pytest.mark.parametrize(
    ("parameter", "part"),
    [
        ("model.visual.blocks.0.weight", "vision"),
        ("model.visual.merger.0.weight", "projector"),
        ("model.visual.merger", "projector"),
        ("model.visual.merger_norm.weight", "vision"),
        ("model.layers.0.weight", "language"),
        ("model.visuals.weight", "language"),
        ("lm_head.weight", "language"),
    ],
)
def test_the_longest_prefix_says_the_part(parameter, part):
    assert PARTS.of(parameter) == part


def test_a_parameter_of_no_part_is_a_mistake_of_the_family():
    with pytest.raises(KeyError, match=r"head\.weight"):
        PARTS.of("head.weight")


def test_a_prefix_ends_at_a_dot():
    assert has_prefix("h.1.attn", "h.1")
    assert has_prefix("h.1", "h.1")
    assert not has_prefix("h.10", "h.1")


@pytest.mark.parametrize(
    ("parameter", "part"),
    [
        ("transformer.visual.conv1.weight", "vision"),
        ("transformer.visual.positional_embedding", "vision"),
        ("transformer.visual.transformer.resblocks.3.attn.in_proj.weight", "vision"),
        ("transformer.visual.attn_pool.pos_embed", "projector"),
        ("transformer.visual.ln_post.weight", "projector"),
        ("transformer.visual.proj", "projector"),
        ("transformer.h.3.attn.c_proj.weight", "language"),
        ("transformer.wte.weight", "language"),
        ("lm_head.weight", "language"),
    ],
)
def test_the_parts_of_qwen_vl_are_its_vit_its_projector_and_its_decoder(parameter, part):
    assert QWEN_VL.parts.of(parameter) == part


@pytest.mark.parametrize("model_type", ["qwen", "qwen_vl"])
def test_qwen_vl_is_told_as_published_and_as_saved(tmp_path: Path, model_type: str):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "visual": {}}))

    assert family_of(tmp_path) is QWEN_VL


def test_a_config_without_a_model_type_is_of_no_family(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")

    with pytest.raises(VltrainError, match="no known family has model_type None"):
        family_of(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"), [("{", "not valid JSON"), ("[1]", "holds no JSON object")]
)
def test_a_broken_config_is_refused(tmp_path: Path, text: str, message: str):
    (tmp_path / "config.json").write_text(text)

    with pytest.raises(VltrainError, match=message):
        read_json(tmp_path / "config.json")


def test_a_folder_without_a_config_is_refused(tmp_path: Path):
    with pytest.raises(VltrainError, match=r"config\.json: there is no such file"):
        family_of(tmp_path)


@pytest.mark.parametrize(
    ("settings", "chat_tuned"),
    [
        ({"chat_format": "chatml"}, True),
        ({"chat_format": "raw"}, False),
        ({}, False),
        (None, False),
    ],
)
def test_a_chat_tuned_checkpoint_says_so_in_its_generation_settings(
    tmp_path: Path, settings: dict | None, chat_tuned: bool
):
    if settings is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(settings))

    assert is_chat_tuned(tmp_path) is chat_tuned


def test_an_adapter_is_not_taken_for_a_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")

    with pytest.raises(VltrainError, match="is an adapter, and a whole model is needed"):
        family_of(tmp_path)
