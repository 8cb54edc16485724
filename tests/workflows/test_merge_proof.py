"""That what was written is base + adapter: how it is measured, said and refused."""

import json
from pathlib import Path

import pytest
import torch
from moved_adapters import ATTENTION, in_dtype, write_adapter
from runs import weights
from safetensors.torch import load_file, save_file
from tiny import write_qwen_vl

from vltrain.errors import VltrainError
from vltrain.models.merging import MergedWeights, saved_adapter
from vltrain.models.plain_weights import plain_weights
from vltrain.workflows.merge import merge
from vltrain.workflows.proof import compare, logits_tolerance, prove_by_tensor
from vltrain.workflows.reload import reload_in_a_fresh_process


@pytest.fixture
def base(tmp_path):
    """A base of each test's own, which it may change."""
    return write_qwen_vl(tmp_path / "base")


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


@pytest.mark.slow
def test_what_a_fresh_process_cannot_read_is_refused(base, tmp_path):
    tensors = load_file(base / "model.safetensors")
    tensors[ATTENTION][0, 0] = float("nan")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(VltrainError, match=r"c_attn\.weight has 1 values that are no numbers"):
        reload_in_a_fresh_process(base, None)
