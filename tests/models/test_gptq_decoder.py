"""Packing a decoder layer by layer: the inputs that layers get, and the errors that are told."""

import pytest
import torch
from tiny import IMAGE_START_ID, write_qwen_vl

from vltrain.errors import VltrainError
from vltrain.models import load_model
from vltrain.models.catalog import QWEN_VL
from vltrain.models.gptq import unpacked_weight
from vltrain.models.gptq_decoder import advance, entries, linear_groups, pack_decoder

CPU = torch.device("cpu")
NAMES = ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_qwen_vl(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def model(folder):
    return load_model(folder)


def sample(seed: int, length: int = 60) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    picture = [IMAGE_START_ID, *[IMAGE_START_ID + 2] * 4, IMAGE_START_ID + 1]
    text = torch.randint(0, 256, (length - 6,), generator=generator).tolist()
    ids = torch.tensor([picture + text])
    labels = ids.clone()
    labels[:, : length // 2] = -100
    pixels = torch.randn(1, 3, 56, 56, generator=generator)
    return {"input_ids": ids, "labels": labels, "pixel_values": pixels}


def test_samples_go_through_the_layers_as_in_the_model(model):
    long = sample(0, length=600)  # past the length of training
    passages = entries(model, QWEN_VL, [long], CPU)

    with torch.no_grad():
        for layer in model.transformer.h:
            advance(layer, passages, CPU)
        whole = model.transformer(long["input_ids"], long["pixel_values"]).last_hidden_state

    torch.testing.assert_close(model.transformer.ln_f(passages[0].hidden), whole)


def test_layers_with_the_same_input_are_packed_together_and_in_their_order(model):
    (passage,) = entries(model, QWEN_VL, [sample(0)], CPU)

    groups = linear_groups(model.transformer.h[0], passage, CPU)

    assert groups == [["attn.c_attn"], ["attn.c_proj"], ["mlp.w1", "mlp.w2"], ["mlp.c_proj"]]


@pytest.fixture(scope="module")
def packed(folder):
    held_out = [sample(seed) for seed in range(20, 23)]
    made = pack_decoder(load_model(folder), QWEN_VL, [sample(n) for n in range(20)], held_out, CPU)
    return made, held_out


def test_every_linear_layer_loses_less_than_by_rounding(packed):
    made, _ = packed

    assert [errors.layer for errors in made.layers] == [0, 1]
    for errors in made.layers:
        assert sorted(errors.linear) == sorted(NAMES)
        assert all(errors.linear[name] < errors.rounding[name] for name in NAMES)
        assert errors.hidden < 0.05


def test_the_errors_told_are_those_of_the_model_that_was_made(packed, folder):
    made, held_out = packed
    plain, other = load_model(folder), load_model(folder)
    with torch.no_grad():
        for number in range(2):
            for name in NAMES:
                place = f"transformer.h.{number}.{name}"
                stored = ("qweight", "qzeros", "scales", "g_idx")
                weight = unpacked_weight(*(made.tensors[f"{place}.{part}"] for part in stored))
                other.get_submodule(place).weight.copy_(weight)
        losses, logits = [[], []], [[], []]
        for each, model in enumerate((plain, other)):
            for values in held_out:
                learned = values["labels"][0, 1:] != -100
                out = model(**values)
                losses[each].append(out.loss * learned.sum())
                logits[each].append(out.logits[0, :-1][learned])
    count = sum(int((v["labels"][:, 1:] != -100).sum()) for v in held_out)
    perplexities = [float((sum(each) / count).exp()) for each in losses]
    before, after = (torch.cat(each) for each in logits)

    assert made.perplexity == pytest.approx(perplexities, rel=1e-4)
    assert made.logits == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-3)
    assert 0 < made.logits < 0.3


def test_the_bias_of_the_plain_layer_is_kept_and_others_are_zeros(packed, folder):
    tensors = packed[0].tensors
    plain = load_model(folder).transformer.h[1].attn.c_attn.bias

    assert tensors["transformer.h.1.attn.c_attn.bias"].equal(plain)
    assert not tensors["transformer.h.1.mlp.w1.bias"].any()


def test_inputs_that_are_not_finite_name_the_layer(model):
    with torch.no_grad():
        model.transformer.h[1].ln_2.weight[0] = torch.inf

    with pytest.raises(VltrainError, match=r"transformer\.h\.1: cannot be packed: inputs are NaN"):
        pack_decoder(model, QWEN_VL, [sample(0)], [sample(1)], CPU)
