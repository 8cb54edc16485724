"""An adapter's folder in the hands of `peft` alone, as the original's README shows it."""

import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from tiny import write_qwen_vl
from transformers import AutoProcessor, AutoTokenizer

from vltrain.config import FreezeConfig
from vltrain.models import load_model, load_processor
from vltrain.models.adapters import Adapter, add_lora
from vltrain.models.catalog import QWEN_VL
from vltrain.models.fingerprint import weights_hash
from vltrain.models.saving import Origin, save_adapter
from vltrain.workflows.verify import folder_findings

IDS = torch.arange(100, 110)[None]


@pytest.fixture(scope="module", params=[False, True], ids=["lora", "lora and whole modules"])
def trained(request, tmp_path_factory):
    """A base in the layout of `transformers`, an adapter of it, and what the two answer."""
    folder = tmp_path_factory.mktemp("peft")
    published = write_qwen_vl(folder / "published")
    base, adapter = folder / "base", folder / "adapter"
    load_model(published).save_pretrained(base)
    load_processor(published).save_pretrained(base)
    freeze = FreezeConfig(projector=False if request.param else None)
    shape = Adapter(r=4, alpha=8, embeddings=request.param)
    model = add_lora(load_model(base), QWEN_VL, freeze, shape, seed=1).eval()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_A" not in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    adapter.mkdir()
    save_adapter(model, Origin(str(base), base, None, weights_hash(base)), adapter)
    return base, adapter, logits(model)


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def test_peft_loads_an_adapter_on_a_loaded_base(trained):
    base, adapter, expected = trained

    assert torch.equal(logits(PeftModel.from_pretrained(load_model(base), adapter)), expected)


def test_peft_finds_base_and_adapter_by_the_adapters_folder_alone(trained):
    _, adapter, expected = trained

    model = AutoPeftModelForCausalLM.from_pretrained(adapter)

    assert torch.equal(logits(model), expected)


def test_what_peft_merges_and_saves_is_a_whole_folder(trained, tmp_path):
    _, adapter, expected = trained
    model = AutoPeftModelForCausalLM.from_pretrained(adapter).eval()

    model.merge_and_unload().save_pretrained(tmp_path / "out", max_shard_size="2048MB")
    AutoTokenizer.from_pretrained(adapter).save_pretrained(tmp_path / "out")

    assert list(folder_findings(tmp_path / "out")) == []
    assert torch.allclose(logits(load_model(tmp_path / "out")), expected, atol=1e-4)
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    assert processor.fingerprint == load_processor(tmp_path / "out").fingerprint


def test_peft_asks_for_remote_code_where_the_base_is_a_published_one(tmp_path):
    base, adapter = write_qwen_vl(tmp_path / "base"), tmp_path / "adapter"
    config = json.loads((base / "config.json").read_text())
    auto_map = {"AutoConfig": "configuration_qwen.QWenConfig"}
    (base / "config.json").write_text(json.dumps(config | {"auto_map": auto_map}))
    adapter.mkdir()
    model = add_lora(load_model(base), QWEN_VL, FreezeConfig(), Adapter(r=4), seed=1)
    save_adapter(model, Origin(str(base), base, None, None), adapter)

    with pytest.raises(ValueError, match="trust_remote_code=True"):
        AutoPeftModelForCausalLM.from_pretrained(adapter, trust_remote_code=False)
    PeftModel.from_pretrained(load_model(base), adapter)
