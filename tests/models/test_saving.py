"""Folders that hold results: what lies in them, and that they load again as they were."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny import write_qwen_vl

import vltrain.models.saving
from vltrain.config import FreezeConfig
from vltrain.models import load_model
from vltrain.models.adapters import Adapter, add_lora
from vltrain.models.catalog import QWEN_VL
from vltrain.models.fingerprint import weights_hash
from vltrain.models.saving import Origin, save_adapter, save_like, write_origin

COMPANIONS = ("config.json", "generation_config.json", "qwen.tiktoken", "tokenizer_config.json")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_qwen_vl(tmp_path / "base")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def names_in(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def moved_adapter(base: Path, **shape) -> PeftModel:
    """An adapter that has learned something, whole modules beside it included."""
    freeze = FreezeConfig(projector=shape.pop("projector", None))
    model = add_lora(load_model(base), QWEN_VL, freeze, Adapter(r=4, alpha=8, **shape), seed=1)
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_A" not in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(100, 110)[None]).logits


def test_a_model_is_saved_with_all_that_its_base_has_beside_the_weights(base, out):
    (base / "modeling_qwen.py").write_text("# the original's code")
    (base / "SimSun.ttf").write_bytes(b"\x00\x01")
    (base / "vltrain.json").write_text("{}")
    (base / "pytorch_model.bin.index.json").write_text("{}")

    save_like(base, load_model(base).state_dict(), out)

    files = {*COMPANIONS, "modeling_qwen.py", "SimSun.ttf"}
    assert names_in(out) == files | {"model.safetensors"}
    assert all((out / name).read_bytes() == (base / name).read_bytes() for name in files)


def test_a_saved_model_loads_again_bit_for_bit(base, out):
    tensors = {name: tensor + 1 for name, tensor in load_model(base).state_dict().items()}

    save_like(base, tensors, out)

    loaded = load_model(out).state_dict()
    assert loaded.keys() == load_file(base / "model.safetensors").keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
def test_the_configs_dtype_follows_the_tensors(base, out, key):
    config = json.loads((base / "config.json").read_text())
    del config["torch_dtype"]
    (base / "config.json").write_text(json.dumps(config | {key: "float32"}))

    tensors = {name: t.bfloat16() for name, t in load_model(base).state_dict().items()}
    save_like(base, tensors, out)

    assert json.loads((out / "config.json").read_text()) == config | {key: "bfloat16"}
    assert {p.dtype for p in load_model(out).parameters()} == {torch.bfloat16}


def test_a_large_model_is_saved_in_shards_with_an_index(base, out, monkeypatch):
    monkeypatch.setattr(vltrain.models.saving, "MAX_SHARD", "500KB")
    tensors = load_model(base).state_dict()

    save_like(base, tensors, out)

    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors.keys()
    assert len(set(index["weight_map"].values())) > 1
    assert all((out / shard).stat().st_size < 520_000 for shard in index["weight_map"].values())
    loaded = load_model(out).state_dict()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("whole", [False, True], ids=["lora", "lora and whole modules"])
def test_a_saved_adapter_is_plain_peft(base, out, whole):
    model = moved_adapter(base, embeddings=whole, projector=False if whole else None)
    save_adapter(model, Origin(str(base), base, None, "sha256:0"), out)

    again = PeftModel.from_pretrained(load_model(base), str(out))

    assert torch.equal(logits(again), logits(model))
    assert not torch.equal(logits(again), logits(load_model(base)))


def test_an_adapters_folder_has_the_tokenizer_and_no_code_or_config_of_the_base(base, out):
    (base / "modeling_qwen.py").write_text("# the original's code")

    save_adapter(moved_adapter(base), Origin(str(base), base, None, "sha256:0"), out)

    ours = {"adapter_config.json", "adapter_model.safetensors", "vltrain.json"}
    assert names_in(out) - {"README.md"} == ours | set(COMPANIONS) - {"config.json"}


def test_an_adapter_holds_what_learned_and_nothing_else(base, out):
    model = moved_adapter(base, embeddings=True)
    save_adapter(model, Origin(str(base), base, None, "sha256:0"), out)

    saved = load_file(out / "adapter_model.safetensors")

    learned = {
        name.replace(".default", "").replace(".modules_to_save", ""): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    assert saved.keys() == learned.keys()
    assert all(torch.equal(saved[name], learned[name]) for name in saved)


def test_an_adapter_says_which_base_it_is_of(base, out):
    origin = Origin("models/qwen", base, None, weights_hash(base))
    save_adapter(moved_adapter(base), origin, out)

    assert json.loads((out / "vltrain.json").read_text()) == {
        "base": {
            "name": "models/qwen",
            "path": str(base.resolve()),
            "revision": None,
            "hash": weights_hash(base),
        }
    }
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base.resolve())
    assert config["revision"] is None


def test_an_adapter_of_a_base_from_the_hub_names_it_and_its_commit(base, out):
    save_adapter(moved_adapter(base), Origin("org/model@v1", base, "c" * 40, "sha256:0"), out)

    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/model"
    assert config["revision"] == "c" * 40


def test_an_origin_stands_in_a_file_of_its_own(base, out):
    write_origin(Origin("org/model@v1", base, "c" * 40, "sha256:0"), out)

    written = json.loads((out / "vltrain.json").read_text())["base"]
    assert (written["name"], written["revision"]) == ("org/model@v1", "c" * 40)
