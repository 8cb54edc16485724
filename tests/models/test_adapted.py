"""Adapters and their bases found again: by folder, and by name on the hub."""

import json
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from tiny import write_qwen_vl

from vltrain.config import FreezeConfig
from vltrain.errors import VltrainError
from vltrain.models import load_model
from vltrain.models.adapted import find_base, load_adapted, read_origin
from vltrain.models.adapters import Adapter, add_lora
from vltrain.models.catalog import QWEN_VL, is_adapter
from vltrain.models.fingerprint import weights_hash
from vltrain.models.saving import Origin, save_adapter

COMMIT = "c" * 40


@pytest.fixture
def base(tmp_path):
    return write_qwen_vl(tmp_path / "base")


def write_adapter(base: Path, out: Path, *, name: str, revision: str | None) -> Path:
    model = add_lora(load_model(base), QWEN_VL, FreezeConfig(), Adapter(r=2, alpha=2), seed=1)
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            parameter.data.fill_(0.01)
    out.mkdir(parents=True)
    save_adapter(model, Origin(name, base, revision, weights_hash(base)), out)
    return out


def test_an_adapter_is_told_from_a_model(base, tmp_path):
    adapter = write_adapter(base, tmp_path / "final", name=str(base), revision=None)

    assert is_adapter(adapter)
    assert not is_adapter(base)


def test_an_adapter_knows_its_base(base, tmp_path):
    adapter = write_adapter(base, tmp_path / "final", name="org/model@v1", revision=COMMIT)

    origin = read_origin(adapter)

    assert origin == Origin("org/model@v1", base.resolve(), COMMIT, weights_hash(base))


def test_a_base_from_the_hub_is_found_by_its_commit(base, tmp_path, monkeypatch):
    adapter = write_adapter(base, tmp_path / "final", name="org/model@v1", revision=COMMIT)
    cache = tmp_path / "cache"
    snapshot = cache / "models--org--model" / "snapshots" / COMMIT
    snapshot.parent.mkdir(parents=True)
    base.rename(snapshot)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    found = find_base(adapter)

    assert found.path == snapshot
    assert found.revision == COMMIT


def test_an_adapter_moves_the_logits_of_its_base(base, tmp_path):
    adapter = write_adapter(base, tmp_path / "final", name=str(base), revision=None)
    ids = torch.arange(100, 110)[None]

    adapted = load_adapted(adapter, find_base(adapter))

    assert not adapted.training
    with torch.no_grad():
        moved = adapted(input_ids=ids).logits
        with adapted.disable_adapter():
            plain = adapted(input_ids=ids).logits
        expected = load_model(base)(input_ids=ids).logits
    assert torch.equal(plain, expected)
    assert (moved - plain).abs().max() > 1e-3


def test_an_adapter_of_a_model_of_other_sizes_is_refused(base, tmp_path):
    adapter = write_adapter(base, tmp_path / "final", name=str(base), revision=None)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["r"] = 3
    (adapter / "adapter_config.json").write_text(json.dumps(config))

    with pytest.raises(VltrainError, match="does not fit its base or is not whole"):
        load_adapted(adapter, find_base(adapter))


def test_an_adapter_whose_weights_are_missing_is_refused(base, tmp_path):
    adapter = write_adapter(base, tmp_path / "final", name=str(base), revision=None)
    (adapter / "adapter_model.safetensors").unlink()

    with pytest.raises(VltrainError, match="does not fit its base or is not whole"):
        load_adapted(adapter, find_base(adapter))


def test_an_adapter_whose_weights_are_cut_off_is_refused(base, tmp_path):
    adapter = write_adapter(base, tmp_path / "final", name=str(base), revision=None)
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])

    with pytest.raises(VltrainError, match="does not fit its base or is not whole"):
        load_adapted(adapter, find_base(adapter))
