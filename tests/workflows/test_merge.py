"""Merging: what is written, that it equals base + adapter, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny import write_gptq, write_qwen_vl

import vltrain.models.saving
import vltrain.workflows.merge
from vltrain.config import FreezeConfig
from vltrain.errors import VltrainError
from vltrain.models import load_model, load_processor
from vltrain.models.adapted import find_base, load_adapted
from vltrain.models.adapters import Adapter, add_lora
from vltrain.models.catalog import QWEN_VL
from vltrain.models.fingerprint import weights_hash
from vltrain.models.merging import MergedWeights, saved_adapter
from vltrain.models.plain_weights import plain_weights
from vltrain.models.quantization import Nf4
from vltrain.models.saving import Origin, save_adapter, write_origin
from vltrain.workflows.merge import merge
from vltrain.workflows.proof import compare, distance, logits_tolerance, prove_by_tensor
from vltrain.workflows.reload import (
    probe_inputs,
    probe_logits,
    reload_in_a_fresh_process,
)

ATTENTION = "transformer.h.0.attn.c_attn.weight"


@pytest.fixture
def base(tmp_path):
    return write_qwen_vl(tmp_path / "base")


@pytest.fixture
def adapter(base, tmp_path):
    return write_adapter(base, tmp_path / "run" / "final")


def write_adapter(base: Path, out: Path, *, scale: float = 0.1, **options) -> Path:
    """An adapter whose second matrices, and whole modules beside them, are moved at random."""
    freeze = FreezeConfig(projector=options.pop("projector", None))
    model = add_lora(load_model(base), QWEN_VL, freeze, Adapter(r=4, alpha=8, **options), seed=1)
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_A" not in name:
            parameter.data += scale * torch.randn_like(parameter)
    out.mkdir(parents=True)
    save_adapter(model, Origin(str(base), base, None, weights_hash(base)), out)
    return out


def in_dtype(folder: Path, dtype: torch.dtype) -> Path:
    """The same checkpoint with its weights and its config in another dtype."""
    file = folder / "model.safetensors"
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def change_a_weight(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[ATTENTION] = tensors[ATTENTION] + 0.1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


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


def test_logits_that_differ_or_are_no_numbers_are_refused():
    expected, unchanged = torch.tensor([[1.0, -1.0]]), torch.tensor([[2.0, 0.0]])
    options = {"dtype": torch.float32, "tolerance": 1e-4, "adapter": Path("a")}

    near = compare(torch.tensor([[1.00005, -1.0]]), expected, unchanged, **options)

    assert near.merged == pytest.approx(3.5e-5, rel=0.05)
    assert near.base == pytest.approx(1.0)
    for wrong in (torch.tensor([[1.01, -1.0]]), torch.tensor([[float("nan"), -1.0]])):
        with pytest.raises(VltrainError, match=r"by (0\.71%|nan%) of the logits"):
            compare(wrong, expected, unchanged, **options)


def test_roundings_of_more_layers_add_up_to_more():
    assert logits_tolerance(torch.bfloat16, 2) == logits_tolerance(torch.bfloat16, 8) == 5e-2
    assert logits_tolerance(torch.bfloat16, 32) == pytest.approx(0.1)
    assert logits_tolerance(torch.float32, 32) == pytest.approx(2e-4)


@pytest.mark.slow
def test_a_merge_says_how_near_it_came(adapter, tmp_path, capsys):
    merge(adapter, tmp_path / "merged")

    report = json.loads((tmp_path / "merged" / "merge.json").read_text())
    said = capsys.readouterr().out
    assert "differ from those of base + adapter by 0.00%" in said
    assert "warning" not in said
    assert report["proof"]["by"] == "logits"
    assert report["proof"]["tolerance"] == 1e-4
    assert report["proof"]["merged_from_base_and_adapter"] < 1e-5
    assert report["into"] == "base"
    assert report["dtype"] == "float32"
    assert len(report["changed"]) == 8
    assert ATTENTION in report["changed"]
    written = {file.name for file in (tmp_path / "merged").iterdir()}
    assert report["files"].keys() == written - {"merge.json"}


def test_a_merge_warns_when_rounding_weighs_as_much_as_what_was_learned(tmp_path, capsys):
    base = in_dtype(write_qwen_vl(tmp_path / "base"), torch.bfloat16)
    adapter = write_adapter(base, tmp_path / "final", scale=2e-4)

    merge(adapter, tmp_path / "merged")

    assert "rounding to bfloat16 weighs as much" in capsys.readouterr().out


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


def test_dora_does_not_go_with_other_adapters(base, adapter, tmp_path):
    other = write_adapter(base, tmp_path / "dora", dora=True)

    with pytest.raises(VltrainError, match="DoRA or PiSSA"):
        merge(adapter, tmp_path / "merged", others=[(other, 0.5)])


def test_a_merge_in_little_memory_writes_the_same_and_proves_each_tensor(base, tmp_path):
    adapter = write_adapter(base, tmp_path / "final", projector=False, embeddings=True)
    merge(adapter, tmp_path / "merged")

    merge(adapter, tmp_path / "small", low_memory=True)

    there, here = weights(tmp_path / "merged"), weights(tmp_path / "small")
    assert all(torch.equal(here[name], tensor) for name, tensor in there.items())
    proof = json.loads((tmp_path / "small" / "merge.json").read_text())["proof"]
    assert proof["by"] == "tensors"
    assert proof["merged_from_base_and_adapter"] < 1e-5 < proof["base_from_base_and_adapter"]


def test_a_tensor_that_is_not_on_the_disk_as_it_was_merged_is_refused(base, adapter, tmp_path):
    merged = MergedWeights(plain_weights(base), [saved_adapter(adapter)])

    with pytest.raises(VltrainError, match=r"of the outputs of transformer\.h\.0\.attn\.c_attn"):
        prove_by_tensor(merged, plain_weights(base))


def test_a_merged_tensor_that_is_not_finite_is_refused(base, adapter, tmp_path):
    merged = MergedWeights(plain_weights(base), [saved_adapter(adapter)])
    merge(adapter, tmp_path / "merged")
    file = tmp_path / "merged" / "model.safetensors"
    tensors = load_file(file)
    tensors["transformer.h.1.mlp.w2.weight"][0, 0] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})

    with pytest.raises(VltrainError, match=r"by nan% of the outputs of transformer\.h\.1\.mlp\.w2"):
        prove_by_tensor(merged, plain_weights(tmp_path / "merged"))


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A bfloat16 base and an adapter that was trained on it in NF4."""
    folder = tmp_path_factory.mktemp("quantized")
    base = in_dtype(write_qwen_vl(folder / "base"), torch.bfloat16)
    adapter = write_adapter(base, folder / "final", scale=0.02)
    write_origin(Origin(str(base), base, None, weights_hash(base), Nf4()), adapter)
    return base, adapter


def from_trained(adapter: Path, base: Path, merged: Path) -> float:
    """How far a merged model is from base in NF4 + adapter, as a share of the logits."""
    inputs = probe_inputs(load_processor(base))
    source = find_base(adapter)
    trained = probe_logits(load_adapted(adapter, source, "bf16", Nf4()), inputs)
    return distance(probe_logits(load_model(merged), inputs), trained)


def test_an_adapter_of_nf4_is_nearer_to_its_model_in_the_dequantized_weights(quantized, tmp_path):
    base, adapter = quantized

    merge(adapter, tmp_path / "dequantized")
    merge(adapter, tmp_path / "base", into="base")

    near = from_trained(adapter, base, tmp_path / "dequantized")
    far = from_trained(adapter, base, tmp_path / "base")
    print(f"dequantized {near:.3%}, base {far:.3%}")
    assert near < 0.02
    assert far > 3 * near
    reports = [
        json.loads((tmp_path / n / "merge.json").read_text()) for n in ("dequantized", "base")
    ]
    assert [report["into"] for report in reports] == ["dequantized", "base"]
    assert reports[1]["proof"]["from_the_model_in_4_bits"] == pytest.approx(far, rel=0.05)


@pytest.mark.slow
def test_what_a_fresh_process_cannot_read_is_refused(base, tmp_path):
    tensors = load_file(base / "model.safetensors")
    tensors[ATTENTION][0, 0] = float("nan")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(VltrainError, match=r"c_attn\.weight has 1 values that are no numbers"):
        reload_in_a_fresh_process(base, None)


def test_only_weights_that_were_in_4_bits_can_be_dequantized(adapter, tmp_path):
    with pytest.raises(VltrainError, match="was not trained on 4 bits"):
        merge(adapter, tmp_path / "merged", into="dequantized")


def test_packed_weights_with_an_adapter_become_plain_ones(tmp_path):
    plain = write_gptq(tmp_path / "packed")
    folder = tmp_path / "packed"
    model = add_lora(load_model(folder), QWEN_VL, FreezeConfig(), Adapter(r=4, alpha=8), seed=1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(0.01)
    (tmp_path / "final").mkdir()
    origin = Origin(str(folder), folder, None, weights_hash(folder))
    save_adapter(model, origin, tmp_path / "final")

    merge(tmp_path / "final", tmp_path / "merged")

    after = weights(tmp_path / "merged")
    layer = "transformer.h.1.mlp.c_proj"
    assert torch.allclose(after[f"{layer}.weight"], plain[layer], atol=1e-6)
    assert f"{layer}.bias" not in after
    assert "quantization_config" not in json.loads((tmp_path / "merged/config.json").read_text())
    other = write_qwen_vl(tmp_path / "plain")
    merge(tmp_path / "final", tmp_path / "in_base", base=str(other), into="base")
    before, after = weights(other), weights(tmp_path / "in_base")
    assert before.keys() == after.keys()
    assert torch.equal(before[f"{layer}.weight"], after[f"{layer}.weight"])
    assert not torch.equal(before[ATTENTION], after[ATTENTION])
