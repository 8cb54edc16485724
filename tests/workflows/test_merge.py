"""Merging: what is written, and that it equals base + adapter."""

import json
from pathlib import Path

import pytest
import torch
from moved_adapters import ATTENTION, in_dtype, write_adapter
from peft import PeftModel
from runs import weights
from safetensors.torch import load_file
from tiny import write_qwen_vl

import vltrain.models.saving
import vltrain.workflows.merge
from vltrain.errors import VltrainError
from vltrain.models import load_model, load_processor
from vltrain.workflows.merge import merge


@pytest.fixture
def base(tmp_path):
    """A base of each test's own, which it may change."""
    return write_qwen_vl(tmp_path / "base")


def test_merged_weights_are_those_of_base_plus_low_rank_product(base, adapter, tmp_path):
    merge(adapter, tmp_path / "merged")

    learned = load_file(adapter / "adapter_model.safetensors")
    prefix = "base_model.model." + ATTENTION.removesuffix("weight")
    low, high = learned[prefix + "lora_A.weight"], learned[prefix + "lora_B.weight"]
    expected = weights(base)[ATTENTION] + 8 / 4 * high @ low
    assert torch.allclose(weights(tmp_path / "merged")[ATTENTION], expected, atol=1e-6)


def test_names_are_the_published_ones_and_what_did_not_learn_is_untouched(base, adapter, tmp_path):
    merge(adapter, tmp_path / "merged")

    before, after = weights(base), weights(tmp_path / "merged")
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    parts = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.w1.weight", "mlp.w2.weight")
    assert moved == {f"transformer.h.{layer}.{part}" for layer in (0, 1) for part in parts}


def test_every_file_of_the_base_comes_along(base, adapter, tmp_path):
    (base / "modeling_qwen.py").write_text("# the original's code")

    merge(adapter, tmp_path / "merged")

    for name in ("qwen.tiktoken", "tokenizer_config.json", "config.json", "modeling_qwen.py"):
        assert (tmp_path / "merged" / name).read_bytes() == (base / name).read_bytes()
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    assert load_processor(tmp_path / "merged").pad_id == 256


def test_modules_that_learned_whole_are_merged_too(base, tmp_path):
    adapter = write_adapter(base, tmp_path / "final", projector=False, embeddings=True)

    merge(adapter, tmp_path / "merged")

    learned = load_file(adapter / "adapter_model.safetensors")
    after = weights(tmp_path / "merged")
    for name in ("transformer.wte.weight", "lm_head.weight", "transformer.visual.attn_pool.query"):
        assert torch.equal(after[name], learned[f"base_model.model.{name}"])
        assert not torch.equal(after[name], weights(base)[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_base_stays_in_its_dtype(tmp_path, dtype):
    base = in_dtype(write_qwen_vl(tmp_path / "base"), dtype)
    adapter = write_adapter(base, tmp_path / "final")

    merge(adapter, tmp_path / "merged")

    after = weights(tmp_path / "merged")
    assert {tensor.dtype for tensor in after.values()} == {dtype}
    wide = load_model(base, dtype=torch.float32)
    exact = PeftModel.from_pretrained(wide, str(adapter)).merge_and_unload().state_dict()
    step = 2**-8 if dtype is torch.bfloat16 else 2**-11  # of rounding once
    assert torch.allclose(after[ATTENTION].float(), exact[ATTENTION], rtol=step, atol=1e-7)


def test_a_base_in_bin_shards_becomes_safetensors_shards(base, tmp_path, monkeypatch):
    tensors = load_file(base / "model.safetensors")
    torch.save(tensors, base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    adapter = write_adapter(base, tmp_path / "final")
    monkeypatch.setattr(vltrain.models.saving, "MAX_SHARD", "500KB")

    merge(adapter, tmp_path / "merged")

    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors.keys()
    assert len(set(index["weight_map"].values())) > 1
    assert not list((tmp_path / "merged").glob("*.bin"))
    assert weights(tmp_path / "merged").keys() == tensors.keys()


def test_a_checkpoint_of_a_run_is_merged_by_what_the_run_says_of_its_base(base, adapter, tmp_path):
    checkpoint = adapter.parent / "checkpoint-3"
    adapter.rename(checkpoint)
    origin = (checkpoint / "vltrain.json").read_text()
    (checkpoint / "vltrain.json").unlink()
    (adapter.parent / "environment.json").write_text(origin)

    merge(checkpoint, tmp_path / "merged")

    assert weights(tmp_path / "merged").keys() == weights(base).keys()


def test_a_base_that_has_moved_is_named(base, adapter, tmp_path):
    moved = base.rename(tmp_path / "elsewhere")
    with pytest.raises(VltrainError, match=r"its base is not in .*base any more"):
        merge(adapter, tmp_path / "merged")

    merge(adapter, tmp_path / "merged", base=str(moved))

    assert (tmp_path / "merged" / "model.safetensors").is_file()


def peft_merged(base: Path, *adapters: tuple[Path, float]) -> dict[str, torch.Tensor]:
    """The base's tensors in float32 with the adapters' products in them, by `peft` alone."""
    model = load_model(base, dtype=torch.float32)
    plain = {name: p.detach().clone() for name, p in model.named_parameters()}
    sums = dict(plain)
    for folder, weight in adapters:
        beside = PeftModel.from_pretrained(load_model(base, dtype=torch.float32), str(folder))
        for name, parameter in beside.merge_and_unload().named_parameters():
            sums[name] = sums[name] + weight * (parameter.detach() - plain[name])
    return sums


@pytest.mark.parametrize("shape", [{"dora": True}, {"rslora": True}, {"pissa": True}])
def test_every_kind_of_adapter_comes_out_as_peft_merges_it(base, tmp_path, shape):
    adapter = write_adapter(base, tmp_path / "final", **shape)

    merge(adapter, tmp_path / "merged", low_memory=True)

    expected = peft_merged(base, (adapter, 1.0))
    for name, tensor in weights(tmp_path / "merged").items():
        assert torch.allclose(tensor, expected[name], atol=1e-5), name


def test_several_adapters_are_added_by_their_weights(base, tmp_path):
    first = write_adapter(base, tmp_path / "a", embeddings=True)
    second = write_adapter(base, tmp_path / "b", scale=0.3, embeddings=True)

    merge(first, tmp_path / "merged", others=[(second, -0.5)])

    expected = peft_merged(base, (first, 1.0), (second, -0.5))
    for name, tensor in weights(tmp_path / "merged").items():
        assert torch.allclose(tensor, expected[name], atol=1e-5), name
    report = json.loads((tmp_path / "merged" / "merge.json").read_text())
    assert [adapter["weight"] for adapter in report["adapters"]] == [1.0, -0.5]
    assert report["proof"]["merged_from_base_and_adapter"] < 1e-4
