"""Merging adapters that were trained on weights in 4 bits."""

import json
from pathlib import Path

import pytest
import torch
from moved_adapters import ATTENTION, in_dtype, write_adapter
from runs import weights
from tiny import write_gptq, write_qwen_vl

from vltrain.config import FreezeConfig
from vltrain.models import load_model, load_processor
from vltrain.models.adapted import find_base, load_adapted
from vltrain.models.adapters import Adapter, add_lora
from vltrain.models.catalog import QWEN_VL
from vltrain.models.fingerprint import weights_hash
from vltrain.models.quantization import Nf4
from vltrain.models.saving import Origin, save_adapter, write_origin
from vltrain.workflows.merge import merge
from vltrain.workflows.proof import distance
from vltrain.workflows.reload import probe_inputs, probe_logits


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
