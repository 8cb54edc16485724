"""Whether a folder is whole: what is found where it is not, and what is said where it is."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import write_gptq, write_qwen_vl

from vltrain.workflows.verify import folder_findings, picture, verify

ATTENTION = "transformer.h.0.attn.c_attn.weight"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_qwen_vl(tmp_path / "model")


def kinds(folder: Path) -> list[str]:
    return [found.kind for found in folder_findings(folder)]


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Put tensors in the place of others; None takes one out."""
    file = folder / "model.safetensors"
    held = load_file(file) | tensors
    save_file({k: v for k, v in held.items() if v is not None}, file, metadata={"format": "pt"})


def test_a_whole_model_answers_and_has_no_findings(model, capsys):
    assert verify(str(model), as_json=True) == 0

    report = json.loads(capsys.readouterr().out)
    assert report["findings"] == []
    assert isinstance(report["answer"], str)


def test_a_model_that_is_not_whole_is_not_asked(model, capsys):
    change(model, **{ATTENTION: None})

    assert verify(str(model)) == 1

    said = capsys.readouterr().out
    assert f"1 missing: {ATTENTION}" in said
    assert "is not whole" in said


def test_a_file_that_was_cut_short_is_found(model):
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])

    assert kinds(model) == ["size"]


def test_a_file_that_the_index_names_and_nobody_downloaded_is_found(model):
    held = list(load_file(model / "model.safetensors"))
    index = dict.fromkeys(held, "model.safetensors") | {"lost": "model-2.safetensors"}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))

    assert kinds(model) == ["missing_file"]


def test_a_tensor_that_is_not_in_the_file_of_the_index_is_found(model):
    held = dict.fromkeys(load_file(model / "model.safetensors"), "model.safetensors")
    index = {"weight_map": held | {"lost": "model.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))

    assert kinds(model) == ["missing_tensor"]


def test_values_that_are_no_numbers_are_counted(model):
    weight = load_file(model / "model.safetensors")[ATTENTION]
    weight[0, :2] = float("inf")
    change(model, **{ATTENTION: weight})

    (found,) = folder_findings(model)
    assert found.kind == "not_finite"
    assert found.message == f"{ATTENTION} has 2 values that are no numbers"


def test_a_tensor_of_another_shape_or_dtype_is_found(model):
    change(
        model, **{ATTENTION: torch.zeros(2, 128), "lm_head.weight": torch.zeros(480, 128).half()}
    )

    shape, dtype = folder_findings(model)
    assert f"1 mismatched: {ATTENTION} [2, 128] for [384, 128]" in shape.message
    assert (dtype.kind, dtype.severity) == ("dtype", "warning")


def test_scales_of_float16_are_no_finding_where_gptq_has_packed(tmp_path):
    write_gptq(tmp_path / "packed")

    assert kinds(tmp_path / "packed") == []


@pytest.mark.parametrize(("key", "value"), [("vocab_size", 400), ("image_start_id", 471)])
def test_a_tokenizer_that_does_not_fit_the_config_is_found(model, key, value):
    config = json.loads((model / "config.json").read_text())
    (config if key in config else config["visual"])[key] = value
    (model / "config.json").write_text(json.dumps(config))

    assert kinds(model)[0] == "tokenizer"


def test_a_vocabulary_or_a_config_that_is_missing_is_found(model):
    (model / "qwen.tiktoken").unlink()
    assert kinds(model) == ["tokenizer"]

    (model / "config.json").unlink()
    assert kinds(model) == ["config"]


def test_a_size_that_is_no_number_is_found(model):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"vocab_size": "480"}))

    (found,) = folder_findings(model)
    assert (found.kind, found.message) == (
        "config",
        "config.json: does not describe a Qwen-VL: vocab_size is '480'",
    )


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json", "merge.json"])
def test_a_json_file_that_is_cut_short_is_found(model, name):
    (model / name).write_text('{"chat_format": "cha')

    (found,) = folder_findings(model)
    assert (found.kind, found.file) == ("broken_file", str(model / name))


@pytest.mark.parametrize("name", ["model.safetensors", "qwen.tiktoken"])
def test_a_pointer_in_the_place_of_a_file_is_found(model, name):
    (model / name).write_text("version https://git-lfs.github.com/spec/v1\nsize 20\n")

    (found,) = folder_findings(model)
    assert (found.kind, found.file) == ("pointer", str(model / name))


def test_a_part_of_packed_weights_that_is_missing_is_found(tmp_path):
    write_gptq(tmp_path / "packed")
    change(tmp_path / "packed", **{"transformer.h.0.mlp.w1.scales": None})

    (found,) = folder_findings(tmp_path / "packed")
    assert "1 missing: transformer.h.0.mlp.w1.scales" in found.message


def test_a_file_that_changed_since_its_merge_is_found(model):
    listed = {"generation_config.json": {"bytes": 1, "sha256": "0"}}
    (model / "merge.json").write_text(json.dumps({"files": listed}))

    assert kinds(model) == ["changed"]


def test_the_picture_shows_a_red_disc_and_a_blue_square():
    drawn = picture()

    assert [drawn.getpixel(at) for at in ((120, 200), (300, 200), (5, 5))] == [
        (255, 0, 0),
        (0, 0, 255),
        (255, 255, 255),
    ]
