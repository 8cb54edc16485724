"""The hash that tells an adapter its base from another."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import write_qwen_vl

from vltrain.errors import VltrainError
from vltrain.models.fingerprint import weights_hash


def test_a_copy_in_another_place_has_the_same_hash(tmp_path):
    base = write_qwen_vl(tmp_path / "base")
    copy = shutil.copytree(base, tmp_path / "copy")
    (copy / "README.md").write_text("what is no weight does not count")

    assert weights_hash(copy) == weights_hash(base)


def test_one_changed_number_gives_another_hash(tmp_path):
    base = write_qwen_vl(tmp_path / "base")
    before = weights_hash(base)
    tensors = load_file(base / "model.safetensors")
    tensors["transformer.ln_f.weight"][0] += 1e-6
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})

    assert weights_hash(base) != before


def test_bin_files_count_where_there_are_no_safetensors(tmp_path):
    torch.save({"a": torch.zeros(2)}, tmp_path / "pytorch_model.bin")
    bin_only = weights_hash(tmp_path)

    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")

    assert bin_only.startswith("sha256:")
    assert weights_hash(tmp_path) != bin_only


def test_an_empty_file_counts_by_its_name(tmp_path):
    write_qwen_vl(tmp_path)
    before = weights_hash(tmp_path)

    (tmp_path / "model-2.safetensors").touch()

    assert weights_hash(tmp_path) != before


def test_a_folder_without_weights_has_no_hash(tmp_path):
    with pytest.raises(VltrainError, match="holds no weights"):
        weights_hash(tmp_path)
