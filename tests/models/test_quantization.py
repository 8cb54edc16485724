"""Bases in 4 bits: what is quantized, what the layers answer, what is refused."""

import json
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file, save_file
from tiny import write_gptq, write_qwen_vl
from torch import nn

from vltrain.config import FreezeConfig
from vltrain.errors import VltrainError
from vltrain.models import load_model
from vltrain.models.adapters import Adapter, add_lora, count_parts
from vltrain.models.catalog import QWEN_VL
from vltrain.models.gptq import packed_weight
from vltrain.models.quantization import Nf4, pack_layers, pack_skeleton
from vltrain.models.random_weights import random_in_nf4

DECODER = ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj")
VIT = ("attn.in_proj", "attn.out_proj", "mlp.c_fc", "mlp.c_proj")
LANGUAGE_LAYERS = {f"transformer.h.{i}.{name}" for i in range(2) for name in DECODER}
VIT_LAYERS = {f"transformer.visual.transformer.resblocks.{i}.{n}" for i in range(2) for n in VIT}
IDS = torch.tensor([[*b"What is it?"]])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen_vl(tmp_path_factory.mktemp("quantization") / "base")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A packed base and the weights that its packed layers stand for."""
    folder = tmp_path_factory.mktemp("quantization") / "packed"
    return folder, write_gptq(folder)


def quantized(model: nn.Module) -> set[str]:
    return {name for name, layer in model.named_modules() if isinstance(layer, Linear4bit)}


@pytest.mark.parametrize(
    ("vision", "expected"), [(False, LANGUAGE_LAYERS), (True, LANGUAGE_LAYERS | VIT_LAYERS)]
)
def test_decoder_layers_are_quantized_and_of_the_rest_the_vit_where_asked(base, vision, expected):
    model = load_model(base, quantize=Nf4(vision=vision))

    assert quantized(model) == expected
    assert model.lm_head.weight.dtype == torch.float32


def test_quantized_layers_are_nf4_with_their_scales_quantized_too(base):
    layer = load_model(base, quantize=Nf4()).get_submodule("transformer.h.0.attn.c_attn")

    assert layer.weight.quant_state.quant_type == "nf4"
    assert layer.weight.quant_state.nested
    assert layer.compute_dtype == torch.float32


def test_a_model_quantized_in_place_is_the_one_that_is_quantized_while_it_is_read(base):
    read, made = load_model(base, quantize=Nf4(vision=True)), load_model(base)
    pack_layers(made, QWEN_VL, Nf4(vision=True), torch.float32, lambda weight: weight)

    assert quantized(made) == quantized(read)
    tensors = dict(made.named_parameters())
    assert all(torch.equal(tensors[name], value) for name, value in read.named_parameters())
    with torch.no_grad():
        assert torch.equal(made.eval()(IDS).logits, read.eval()(IDS).logits)


def test_adapters_sit_on_a_model_quantized_in_place(base):
    model = load_model(base)
    pack_layers(model, QWEN_VL, Nf4(), torch.float32, lambda weight: weight)

    learning = add_lora(model, QWEN_VL, FreezeConfig(), Adapter(r=4), seed=0)

    adapted = learning.get_submodule("base_model.model.transformer.h.0.attn.c_attn")
    assert isinstance(adapted.base_layer, Linear4bit)
    assert type(adapted).__module__ == "peft.tuners.lora.bnb"


@pytest.mark.parametrize("vision", [False, True])
def test_a_model_of_random_weights_is_of_the_kinds_that_are_read(base, vision):
    read = load_model(base, quantize=Nf4(vision))
    device = torch.device("cpu")
    made = random_in_nf4(QWEN_VL, read.config, Nf4(vision), torch.float32, device)

    assert quantized(made) == quantized(read)
    kinds = [
        {name: (p.shape, p.dtype, p.device) for name, p in model.named_parameters()}
        for model in (made, read)
    ]
    assert kinds[0] == kinds[1]
    for name, parameter in made.named_parameters():
        assert name.endswith("bias") or parameter.any(), name
    with torch.no_grad():
        assert made.eval()(IDS).logits.std() > 0


def test_a_skeleton_has_the_bytes_of_the_quantized_model(base):
    real, skeleton = load_model(base, quantize=Nf4()), load_model(base)
    pack_skeleton(skeleton, QWEN_VL, Nf4())

    for name in LANGUAGE_LAYERS:
        weight = real.get_submodule(name).weight
        scales = weight.quant_state.absmax
        counted = skeleton.get_submodule(name).weight
        assert counted.numel() == weight.numel() + scales.numel()


def test_what_is_not_quantized_is_as_in_its_file(base):
    model = load_model(base, quantize=Nf4())

    file = load_file(base / "model.safetensors")
    named = dict(model.named_parameters())
    kept = {name: named[name] for name in named.keys() - {f"{n}.weight" for n in LANGUAGE_LAYERS}}
    assert len(kept) == len(file) - len(LANGUAGE_LAYERS)
    assert all(torch.equal(parameter, file[name]) for name, parameter in kept.items())


def test_a_quantized_model_answers_nearly_as_the_whole_one(base):
    whole = load_model(base)(input_ids=IDS).logits
    model = load_model(base, quantize=Nf4(vision=True))

    error = (model(input_ids=IDS).logits - whole).square().mean() / whole.square().mean()

    assert 0 < error.sqrt() < 0.2


def test_weights_of_4_bits_count_as_weights(base, packed):
    plain = count_parts(load_model(base), QWEN_VL)

    nf4 = count_parts(load_model(base, quantize=Nf4(vision=True)), QWEN_VL)
    gptq = count_parts(load_model(packed[0]), QWEN_VL)

    totals = {part: count.total for part, count in plain.items()}
    assert {part: count.total for part, count in nf4.items()} == totals
    # c_attn's bias is a buffer of the packed layer
    assert gptq["language"].total == totals["language"] - 2 * 384
    assert {part: count.total for part, count in gptq.items() if part != "language"} == {
        part: total for part, total in totals.items() if part != "language"
    }


def test_a_packed_layer_stands_for_the_weights_that_were_packed(packed):
    folder, weights = packed
    model = load_model(folder)

    assert set(weights) == LANGUAGE_LAYERS
    for name, weight in weights.items():
        found = packed_weight(model.get_submodule(name)).float()
        torch.testing.assert_close(found, weight, rtol=1e-3, atol=1e-7)


def test_a_packed_model_answers_as_a_plain_one_with_the_same_weights(packed, tmp_path):
    folder, weights = packed
    plain = write_qwen_vl(tmp_path / "plain")
    file = load_file(folder / "model.safetensors")
    tensors = load_file(plain / "model.safetensors")
    tensors |= {name: file[name] for name in tensors if name in file}
    tensors |= {f"{name}.weight": weight for name, weight in weights.items()}
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})

    expected = load_model(plain)(input_ids=IDS).logits

    torch.testing.assert_close(
        load_model(folder)(input_ids=IDS).logits, expected, rtol=1e-2, atol=1e-3
    )


@pytest.mark.parametrize("kind", ["nf4", "gptq"])
def test_every_adapter_of_a_quantized_model_gets_a_gradient(base, packed, kind):
    if kind == "nf4":
        loaded = load_model(base, quantize=Nf4(vision=True))
    else:
        loaded = load_model(packed[0], dtype="fp32")
    model = add_lora(loaded, QWEN_VL, FreezeConfig(), Adapter(r=4, dropout=0.0), seed=1)
    adapters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for name, parameter in adapters.items():
        if "lora_B" in name:  # they begin at zero, which keeps the gradient from lora_A
            parameter.data.fill_(0.01)

    model.train()(input_ids=IDS, labels=IDS).loss.backward()

    assert len(adapters) == 2 * 4 * 2
    assert {name for name, p in adapters.items() if p.grad is None or not p.grad.any()} == set()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"desc_act": True}, "desc_act True"),
        ({"checkpoint_format": "gptq_v2"}, "gptq_v2"),
        ({"quant_method": "awq"}, "awq"),
    ],
)
def test_a_base_that_is_quantized_otherwise_is_refused(packed, tmp_path, settings, words):
    config = json.loads((packed[0] / "config.json").read_text())
    config["quantization_config"] |= settings
    for file in packed[0].iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))

    with pytest.raises(VltrainError, match=f"(?s){words}.*bf16 checkpoint"):
        load_model(tmp_path)


def test_settings_beside_the_config_are_read_as_well(packed, tmp_path):
    for file in packed[0].iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((packed[0] / "config.json").read_text())
    settings = config.pop("quantization_config")
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "quantize_config.json").write_text(json.dumps(settings))

    assert torch.equal(
        load_model(tmp_path)(input_ids=IDS).logits, load_model(packed[0])(input_ids=IDS).logits
    )


def test_a_packed_base_with_a_tensor_missing_is_refused(packed, tmp_path):
    for file in packed[0].iterdir():
        (tmp_path / file.name).symlink_to(file)
    tensors = load_file(packed[0] / "model.safetensors")
    del tensors["transformer.h.1.mlp.w1.scales"]
    (tmp_path / "model.safetensors").unlink()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(VltrainError, match=r"1 missing: transformer\.h\.1\.mlp\.w1\.scales"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("adapter", "key"), [(Adapter(dora=True), "lora.dora"), (Adapter(pissa=True), "lora.start")]
)
def test_what_packed_weights_cannot_have_is_refused_by_its_key(packed, adapter, key):
    with pytest.raises(VltrainError, match=key.replace(".", r"\.")):
        add_lora(load_model(packed[0]), QWEN_VL, FreezeConfig(), adapter, seed=0)
