"""What is not merged: adapters and bases that do not belong together or are not whole."""

import json
import shutil
from pathlib import Path

import pytest
from moved_adapters import ATTENTION, write_adapter
from safetensors.torch import load_file, save_file
from tiny import write_qwen_vl

from vltrain.errors import VltrainError
from vltrain.workflows.merge import merge


@pytest.fixture
def base(tmp_path):
    """A base of each test's own, which it may change."""
    return write_qwen_vl(tmp_path / "base")


def change_a_weight(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[ATTENTION] = tensors[ATTENTION] + 0.1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_another_base_is_refused(base, adapter, tmp_path):
    other = shutil.copytree(base, tmp_path / "other")
    change_a_weight(other)

    with pytest.raises(VltrainError, match=r"not those that .* was trained on"):
        merge(adapter, tmp_path / "merged", base=str(other))

    assert not (tmp_path / "merged").exists()


def test_a_base_that_was_changed_in_its_place_is_refused(base, adapter, tmp_path):
    change_a_weight(base)

    with pytest.raises(VltrainError, match=r"not those that .* was trained on"):
        merge(adapter, tmp_path / "merged")


def test_a_folder_that_exists_is_never_written_to(adapter, tmp_path):
    (tmp_path / "merged").mkdir()

    with pytest.raises(VltrainError, match="exists already"):
        merge(adapter, tmp_path / "merged")


def test_a_folder_that_is_no_adapter_is_refused(base, tmp_path):
    with pytest.raises(VltrainError, match=r"no adapter_config\.json"):
        merge(base, tmp_path / "merged")


def test_an_adapter_without_its_origin_is_held_by_sizes_and_warned_about(
    base, adapter, tmp_path, caplog
):
    (adapter / "vltrain.json").unlink()

    merge(adapter, tmp_path / "merged", low_memory=True)

    assert "no hash tells whether it belongs to" in caplog.text
    report = json.loads((tmp_path / "merged" / "merge.json").read_text())
    assert report["adapters"][0]["hash_of_its_base"] is None
    sizes = json.loads((base / "config.json").read_text()) | {"vocab_size": 512, "kv_channels": 16}
    other = write_qwen_vl(tmp_path / "other", config=sizes)
    with pytest.raises(VltrainError, match=r"c_attn\.lora_B\.weight \[384, 4\] for \[192, 4\]"):
        merge(adapter, tmp_path / "again", base=str(other))


def test_an_adapter_that_names_no_base_is_refused(adapter, tmp_path):
    (adapter / "vltrain.json").unlink()
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": None})
    )

    with pytest.raises(VltrainError, match=r"vltrain\.json is missing"):
        merge(adapter, tmp_path / "merged")


def test_an_adapter_that_lacks_a_tensor_is_refused(adapter, tmp_path):
    file = adapter / "adapter_model.safetensors"
    learned = load_file(file)
    lost = next(name for name in learned if "h.1.mlp.w2.lora_B" in name)
    save_file({k: v for k, v in learned.items() if k != lost}, file)

    with pytest.raises(VltrainError, match=r"h\.1\.mlp\.w2\.lora_B"):
        merge(adapter, tmp_path / "merged")


def test_an_adapter_that_changes_nothing_is_refused(base, tmp_path):
    adapter = write_adapter(base, tmp_path / "final", scale=0.0)

    with pytest.raises(VltrainError, match="changes nothing"):
        merge(adapter, tmp_path / "merged")

    assert not list(tmp_path.glob("merged*"))


def test_dora_does_not_go_with_other_adapters(base, adapter, tmp_path):
    other = write_adapter(base, tmp_path / "dora", dora=True)

    with pytest.raises(VltrainError, match="DoRA or PiSSA"):
        merge(adapter, tmp_path / "merged", others=[(other, 0.5)])


def test_only_weights_that_were_in_4_bits_can_be_dequantized(adapter, tmp_path):
    with pytest.raises(VltrainError, match="was not trained on 4 bits"):
        merge(adapter, tmp_path / "merged", into="dequantized")
