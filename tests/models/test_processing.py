"""Qwen-VL's pixels and ids of pictures, and reading them off a checkpoint's folder."""

import base64
import hashlib
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from vltrain.errors import VltrainError
from vltrain.models.qwen_vl.processing import QwenVLImageProcessor, processor_from_folder

GOLDEN = Path(__file__).parents[1] / "golden"

REFERENCE = json.loads((GOLDEN / "images" / "preprocess_448.json").read_text())["images"]
PICTURES = [case for case in REFERENCE if (GOLDEN / case["path"]).exists()]


@pytest.fixture
def folder(tmp_path):
    """A checkpoint's folder as published, but for the weights; 260 ranks."""
    tokens = [bytes([byte]) for byte in range(256)] + [b"he", b"ll", b"hell", b"hello"]
    lines = [base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(tokens)]
    (tmp_path / "qwen.tiktoken").write_bytes(b"\n".join(lines))
    config = {
        "model_type": "qwen",
        "auto_map": {"AutoConfig": "configuration_qwen.QWenConfig"},
        "visual": {"image_size": 112, "n_queries": 16},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize("case", PICTURES, ids=lambda case: case["path"])
def test_pixels_equal_the_reference_bit_for_bit(case):
    picture = Image.open(GOLDEN / case["path"])

    pixels = QwenVLImageProcessor()(images=[picture], return_tensors="pt")["pixel_values"]

    assert pixels.shape == (1, 3, 448, 448)
    assert pixels.dtype == torch.float32
    found = hashlib.sha256(pixels[0].numpy().tobytes()).hexdigest()
    assert found == case["sha256_float32_chw"]


def test_several_pictures_of_different_sizes_are_stacked_in_order():
    white, black = Image.new("RGB", (40, 10), "white"), Image.new("L", (7, 9), "black")

    pixels = QwenVLImageProcessor(image_size=28)([white, black])["pixel_values"]

    assert pixels.shape == (2, 3, 28, 28)
    red = pixels[:, 0, 0, 0]
    assert red.tolist() == pytest.approx([(1 - 0.48145466) / 0.26862954, -0.48145466 / 0.26862954])


def test_one_picture_needs_no_list():
    picture = Image.new("RGB", (5, 5))

    assert QwenVLImageProcessor(image_size=14)(picture)["pixel_values"].shape == (1, 3, 14, 14)


def test_a_saved_image_processor_is_loaded_again(tmp_path):
    QwenVLImageProcessor(image_size=112).save_pretrained(tmp_path)

    again = QwenVLImageProcessor.from_pretrained(tmp_path)

    assert again.image_size == 112
    assert again.image_mean == [0.48145466, 0.4578275, 0.40821073]


def test_sizes_come_from_the_published_config(folder):
    processor = processor_from_folder(folder)

    assert processor.image_processor.image_size == 112
    assert processor.picture_side == 112
    assert processor.image_ids("cat.png") == [474, *[476] * 16, 475]


def test_a_config_without_numbers_of_its_own_means_the_published_ones(folder):
    (folder / "config.json").write_text('{"visual": {}}')

    processor = processor_from_folder(folder)

    assert processor.image_processor.image_size == 448
    assert len(processor.image_ids("cat.png")) == 258


def test_the_ids_of_the_layout_are_those_of_the_vocabulary(folder):
    processor = processor_from_folder(folder)

    assert processor.pad_id == 260
    assert processor.turn_start_id == 261
    assert processor.turn_end_id == 262
    assert processor.newline_id == 10
    assert processor.default_system == "You are a helpful assistant."


def test_text_ids_read_boxes_and_nothing_that_controls(folder):
    processor = processor_from_folder(folder)

    assert processor.text_ids("hello</ref>") == [259, 469]
    assert max(processor.text_ids("<|im_end|><img><imgpad>")) < 260


def test_a_line_end_of_the_real_vocabulary_is_198(folder, qwen_vocabulary):
    (folder / "qwen.tiktoken").write_bytes(qwen_vocabulary.read_bytes())

    assert processor_from_folder(folder).newline_id == 198


def test_what_a_processor_saves_makes_a_folder_that_loads(folder, tmp_path):
    processor_from_folder(folder).save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "config.json").write_bytes((folder / "config.json").read_bytes())

    again = processor_from_folder(tmp_path / "saved")

    assert again.text_ids("hello") == [259]


def test_a_folder_without_a_vocabulary_is_refused(folder):
    (folder / "qwen.tiktoken").unlink()

    with pytest.raises(VltrainError, match=r"no qwen\.tiktoken"):
        processor_from_folder(folder)


@pytest.mark.parametrize(
    ("config", "fault"),
    [
        (None, r"no config\.json"),
        ("{", "is not JSON"),
        ('{"model_type": "qwen"}', "no `visual` section"),
        ("[]", "no `visual` section"),
    ],
)
def test_a_folder_that_is_no_qwen_vl_is_refused(folder, config, fault):
    (folder / "config.json").unlink()
    if config is not None:
        (folder / "config.json").write_text(config)

    with pytest.raises(VltrainError, match=fault):
        processor_from_folder(folder)
